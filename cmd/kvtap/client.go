// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// engineFlags say which engine to follow.
type engineFlags struct {
	replay  string
	model   string
	pod     string
	topic   string
	fromSeq uint64
	listen  bool
	lost    string
}

func (f *engineFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.replay, "replay", "", "`endpoint` that replays what was published before, such as HOST:5558")
	flags.StringVar(&f.model, "model", "", "`name` of the engine's model")
	flags.StringVar(&f.pod, "pod", "", "`name` of the engine (default: its endpoint)")
	flags.StringVar(&f.topic, "topic", "", "take only topics that begin with this `prefix`")
	flags.Uint64Var(&f.fromSeq, "from-seq", 0, "first sequence `number` wanted")
	flags.BoolVar(&f.listen, "listen", false, "wait at ENDPOINT for the engine to connect")
	flags.StringVar(&f.lost, "history-lost", "clear", "`policy` for lost history: clear (reset) or keep (bound unknown)")
	complete(cmd, "history-lost", "clear", "keep")
	for _, name := range []string{"replay", "model", "pod", "topic", "from-seq"} {
		complete(cmd, name)
	}
}

// stopPatience is how long an interrupted command waits for output that is stuck.
const stopPatience = time.Second

// config returns the client that the flags ask for.
func (f *engineFlags) config(endpoint string, log *slog.Logger) (*kvcache.ZMQClientConfig, error) {
	pub, err := fullEndpoint("ENDPOINT", endpoint)
	if err != nil {
		return nil, err
	}
	_, address, _ := zmtp.ParseEndpoint(pub)
	if !f.listen && (strings.HasPrefix(address, ":") || strings.HasSuffix(address, ":0")) {
		return nil, usagef("ENDPOINT %s has a wildcard, which cannot be connected to; name the host and the port, "+
			"or give --listen to wait there for the engine", endpoint)
	}
	config := &kvcache.ZMQClientConfig{
		PodKey:       f.pod,
		ModelName:    f.model,
		PubEndpoint:  pub,
		NoReplay:     f.replay == "",
		Listen:       f.listen,
		Topic:        f.topic,
		FromSequence: f.fromSeq,
		StopTimeout:  stopPatience,
		Logger:       log,
	}
	switch f.lost {
	case kvcache.PolicyClear.String():
	case kvcache.PolicyKeep.String():
		config.HistoryLost = kvcache.PolicyKeep
	default:
		return nil, usagef("--history-lost: %q is neither clear nor keep", f.lost)
	}
	if config.PodKey == "" {
		config.PodKey = endpoint
	}
	if f.replay != "" {
		if config.ReplayEndpoint, err = fullEndpoint("--replay", f.replay); err != nil {
			return nil, err
		}
	}
	if err := kvcache.ValidateConfig(config); err != nil {
		return nil, &usageError{err}
	}
	return config, nil
}

// hintReplay says once what is lost without a replay endpoint.
func (f *engineFlags) hintReplay(log *slog.Logger) {
	if f.replay == "" {
		log.Info("no replay endpoint: what was published before now, or while the connection is lost, will be missing",
			"hint", "give --replay HOST:PORT, by convention port 5558")
	}
}

// fullEndpoint adds what users leave out of an endpoint: tcp:// before HOST:PORT, ipc:// before a path.
func fullEndpoint(name, endpoint string) (string, error) {
	full := endpoint
	switch {
	case strings.Contains(endpoint, "://"):
	case strings.HasPrefix(endpoint, "/"):
		full = "ipc://" + endpoint
	default:
		full = "tcp://" + endpoint
	}
	if _, _, err := zmtp.ParseEndpoint(full); err != nil {
		return "", usagef("%s: %w", name, err)
	}
	return full, nil
}

// follow runs a client until ctx ends, or until stop is called by what handles its events; then it returns the error
// that was given to stop.
func follow(
	ctx context.Context, config *kvcache.ZMQClientConfig, handler func(stop func(error)) kvcache.EventHandler,
) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := kvcache.NewZMQClient(config, handler(func(err error) { cancel(err) })).Run(inner)
	// Why it ended matters more than that a handler was stuck in a write then.
	if cause := context.Cause(inner); cause != nil {
		err = cause
	}
	if errors.Is(err, errDone) {
		return nil
	}
	return err
}

// errDone ends a command that has done what was asked for.
var errDone = errors.New("done")

// quieter is a log handler that takes only warnings and errors: changes of state are shown elsewhere.
type quieter struct{ slog.Handler }

func (q quieter) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && q.Handler.Enabled(ctx, level)
}
func (q quieter) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quieter{q.Handler.WithAttrs(attrs)}
}
func (q quieter) WithGroup(name string) slog.Handler { return quieter{q.Handler.WithGroup(name)} }
