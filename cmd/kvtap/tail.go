// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

func (a *app) tailCommand() *cobra.Command {
	var engine engineFlags
	cmd := &cobra.Command{
		Use:   "tail ENDPOINT",
		Short: "Show the events of an engine as they happen",
		Long: `Follow the events of an engine: a line for each, with changes of state in between, until interrupted.

ENDPOINT is where the engine publishes, as HOST:PORT, tcp://HOST:PORT or ipc:///PATH; vLLM's default port is 5557. With
--replay, what was published before is fetched first, gaps are filled, and a restart of the engine is noticed; the port
is that of the engine's replay_endpoint, by convention 5558. With --listen, kvtap waits at ENDPOINT, such as *:5557, for
an engine that connects out.

With --json each line is an object of one of three kinds, in the order in which they happened:

  {"kind":"batch","seq":7,"replayed":false,"ts":...,"data_parallel_rank":...,"events":[...],"skipped":[...]}
  {"kind":"state","state":"live","bound":"exact","reason":null}
  {"kind":"reset","reason":"restart"}

Batches are as "kvtap decode" shows them; with --pod or --model, and only then, the keys "pod" and "model" follow
"replayed". The stream opens with the state connecting and a reset with the reason start. It just ends at an
interruption: the state stopped is never shown.

Who folds the batches, and forgets everything at each reset, has the engine's state. Its bound is exact, at_least (older
history is missing: what is shown is there, more may be) or unknown.`,
		Example: `  kvtap tail 10.0.0.7:5557 --replay 10.0.0.7:5558
  kvtap tail 10.0.0.7:5557 --json | jq -c 'select(.kind == "state")'
  kvtap tail --listen '*:5557'`,
		Args:              exactly("ENDPOINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			config, err := engine.config(args[0], a.clientLog())
			if err != nil {
				return err
			}
			engine.hintReplay(a.log)
			return a.tail(cmd.Context(), config, engine.pod)
		},
	}
	engine.register(cmd)
	return cmd
}

// clientLog returns the log for a client whose states are shown on stdout. They are in the log too only if asked for.
func (a *app) clientLog() *slog.Logger {
	if a.logAsked {
		return a.log
	}
	return slog.New(quieter{a.log.Handler()})
}

// tail follows an engine on stdout until ctx ends. Its name is part of JSON lines if pod is not empty.
func (a *app) tail(ctx context.Context, config *kvcache.ZMQClientConfig, pod string) error {
	var out *burstWriter
	err := follow(ctx, config, func(stop func(error)) kvcache.EventHandler {
		out = newBurstWriter(a.stdout, stop)
		if a.wantsJSON(false) {
			return &jsonTail{out: out, pod: pod, model: config.ModelName}
		}
		return newTextTail(out, &render.Table{Source: true, Colour: colourful(a.stdout)})
	})
	flushed := make(chan error, 1)
	go func() { flushed <- out.Flush() }()
	// A reader that is stuck must not hold up an interruption.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(stopPatience, func() { close(interrupted) }) })
	defer stop()
	select {
	case flushErr := <-flushed:
		if flushErr != nil && ctx.Err() == nil {
			return flushErr
		}
	case <-interrupted:
	}
	return err
}

var (
	_ kvcache.BatchHandler  = (*jsonTail)(nil)
	_ kvcache.ResyncHandler = (*jsonTail)(nil)
	_ kvcache.StatusHandler = (*jsonTail)(nil)
	_ kvcache.BatchHandler  = (*textTail)(nil)
	_ kvcache.ResyncHandler = (*textTail)(nil)
	_ kvcache.StatusHandler = (*textTail)(nil)
)

// jsonTail writes what happens to an engine as JSON lines. Errors of writing end the command by way of out.
type jsonTail struct {
	out        io.Writer
	pod, model string
	buf        []byte
}

func (t *jsonTail) line() {
	t.buf = append(t.buf, '\n')
	_, _ = t.out.Write(t.buf) // out tells of errors itself
}

// HandleEvent is never called: batches come whole.
func (t *jsonTail) HandleEvent(kvcache.KVEvent) error { return nil }

func (t *jsonTail) HandleBatch(b *event.Batch, info kvcache.BatchInfo) error {
	t.buf = render.AppendTailBatch(t.buf[:0], b, render.Provenance{
		Seq: info.Sequence, Replayed: info.Replayed, Pod: t.pod, Model: t.model,
	})
	t.line()
	return nil
}

func (t *jsonTail) HandleReset(r kvcache.Reset) error {
	t.buf = render.AppendReset(t.buf[:0], string(r.Reason))
	t.line()
	return nil
}

func (t *jsonTail) HandleStatus(s kvcache.Status) {
	t.buf = render.AppendState(t.buf[:0], s.State.String(), s.Bound.String(), string(s.Reason))
	t.line()
}

// textTail writes what happens to an engine as a table.
type textTail struct {
	out   io.Writer
	table *render.Table
	now   func() time.Time
	buf   []byte
}

// newTextTail begins with the names of the columns.
func newTextTail(out io.Writer, table *render.Table) *textTail {
	t := &textTail{out: out, table: table, now: time.Now}
	t.buf = table.AppendHeader(nil)
	t.flush()
	return t
}

func (t *textTail) flush() {
	_, _ = t.out.Write(t.buf) // out tells of errors itself
	t.buf = t.buf[:0]
}

// HandleEvent is never called: batches come whole.
func (t *textTail) HandleEvent(kvcache.KVEvent) error { return nil }

func (t *textTail) HandleBatch(b *event.Batch, info kvcache.BatchInfo) error {
	t.buf = t.table.AppendBatch(t.buf, b, render.Row{
		At: info.ReceivedAt, Seq: info.Sequence, HasSeq: true, Replayed: info.Replayed,
	})
	t.flush()
	return nil
}

func (t *textTail) HandleReset(r kvcache.Reset) error {
	// At the start there is nothing to forget.
	if r.Reason != kvcache.ReasonStart {
		t.buf = t.table.AppendNote(t.buf, r.At, "reset: "+resets[r.Reason]+"; what was shown before no longer holds")
		t.flush()
	}
	return nil
}

func (t *textTail) HandleStatus(s kvcache.Status) {
	note := s.State.String() + ", " + s.Bound.String()
	if s.Reason != "" {
		note += " (" + string(s.Reason) + ")"
	}
	if s.Err != "" {
		note += ": " + render.Clean(s.Err)
	}
	t.buf = t.table.AppendNote(t.buf, t.now(), note)
	t.flush()
}

// resets says in words why a state was reset.
var resets = map[kvcache.Reason]string{
	kvcache.ReasonRestart:     "the engine restarted",
	kvcache.ReasonHistoryLost: "the engine no longer has the batches that are missing",
	kvcache.ReasonUnreadable:  "something that may have removed blocks could not be read",
}
