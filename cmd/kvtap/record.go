// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/recording"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

func (a *app) recordCommand() *cobra.Command {
	var engine engineFlags
	var limit recordLimit
	var force bool
	cmd := &cobra.Command{
		Use:   "record ENDPOINT FILE",
		Short: "Keep what an engine sends in a file",
		Long: `Record what an engine sends, byte for byte, as JSON lines (gzipped if FILE ends in .gz):

  {"received_at":"2026-03-01T12:00:00.123456Z","topic":"","seq":7,"payload":"<base64>"}

Recording goes on until it is interrupted, or for --count messages or --duration; the file is complete in each case.
Payloads that cannot be decoded are recorded as well. "kvtap fold" shows what the engine held at the end, "kvtap decode"
what was sent, and "kvtap sim --play" sends it again. FILE "-" is standard output. ENDPOINT is as for "kvtap tail".`,
		Example: `  kvtap record 10.0.0.7:5557 run.jsonl.gz --replay 10.0.0.7:5558
  kvtap record 10.0.0.7:5557 run.jsonl --count 100
  kvtap record 10.0.0.7:5557 - --duration 10s | kvtap decode`,
		Args: exactly("ENDPOINT", "FILE"),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit.duration < 0 {
				return usagef("--duration must not be negative: %v", limit.duration)
			}
			config, err := engine.config(args[0], a.log)
			if err != nil {
				return err
			}
			engine.hintReplay(a.log)
			return a.record(cmd.Context(), config, args[1], force, limit)
		},
	}
	engine.register(cmd)
	flags := cmd.Flags()
	flags.Uint64Var(&limit.count, "count", 0, "end after `N` messages; 0 is no limit")
	flags.DurationVar(&limit.duration, "duration", 0, "end after this `time`, such as 30s; 0 is no limit")
	flags.BoolVar(&force, "force", false, "overwrite FILE")
	return cmd
}

// recordLimit says when a recording ends by itself. Zeros are no limits.
type recordLimit struct {
	count    uint64
	duration time.Duration
}

// flushEvery is how old what a crash costs can be.
const flushEvery = time.Second

func (a *app) record(
	ctx context.Context, config *kvcache.ZMQClientConfig, name string, force bool, limit recordLimit,
) error {
	out, err := a.create(name, force)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // where it matters it is closed, and checked, before
	r := &recorder{out: recording.NewWriter(out, recording.Gzipped(name)), limit: limit.count}
	var ticks sync.WaitGroup
	ending, end := context.WithCancel(ctx)
	defer ticks.Wait()
	defer end()
	err = follow(ctx, config, func(stop func(error)) kvcache.EventHandler {
		r.stop = stop
		ticks.Go(func() { a.tick(ending, r) })
		if limit.duration > 0 {
			timer := time.AfterFunc(limit.duration, func() { stop(errDone) })
			context.AfterFunc(ending, func() { timer.Stop() })
		}
		return r
	})
	end()
	ticks.Wait()
	total, closeErr := r.close()
	if closeErr == nil {
		closeErr = out.Close()
	}
	if closeErr != nil && err == nil {
		err = closeErr
	}
	if err != nil && ctx.Err() == nil {
		// An empty file would only be in the way of the next try.
		if total.Messages == 0 && name != "-" && !force {
			_ = os.Remove(name)
		}
		return err
	}
	if sumErr := a.sumUp(name, total); err == nil {
		err = sumErr
	}
	return err
}

// create makes the file to record to.
func (a *app) create(name string, force bool) (io.WriteCloser, error) {
	if name == "-" {
		return keepOpen{a.stdout}, nil
	}
	flag := os.O_WRONLY | os.O_CREATE | os.O_EXCL
	if force {
		flag = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	}
	f, err := os.OpenFile(name, flag, 0o666)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s exists already; give another name, or --force to overwrite it", name)
	}
	return f, err
}

// keepOpen is standard output, which is not ours to close.
type keepOpen struct{ io.Writer }

func (keepOpen) Close() error { return nil }

// tick flushes the recording and shows its progress to a person.
func (a *app) tick(ctx context.Context, r *recorder) {
	ticker := time.NewTicker(flushEvery)
	defer ticker.Stop()
	terminal := isTerminal(a.stderr)
	for {
		select {
		case <-ctx.Done():
			if terminal {
				fmt.Fprint(a.stderr, "\r\x1b[K")
			}
			return
		case <-ticker.C:
		}
		total, state := r.progress()
		if terminal {
			fmt.Fprintf(a.stderr, "\r\x1b[K%d messages, %s, %s\r", total.Messages, size(total.Bytes), state)
		}
	}
}

// sumUp says what was recorded: as JSON on stdout if that was asked for and is free, else on stderr.
func (a *app) sumUp(name string, total recorded) error {
	total.File = name
	if a.wantsJSON(false) && name != "-" {
		line, err := json.Marshal(total)
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(append(line, '\n'))
		return err
	}
	numbers := ""
	if total.FirstSeq != nil {
		numbers = fmt.Sprintf(", first sequence %d, last %d", *total.FirstSeq, *total.LastSeq)
	}
	a.complain("recorded %s, %s of payload%s", plural(total.Messages, "message", "messages"), size(total.Bytes),
		numbers)
	return nil
}

// recorded is what a recording holds.
type recorded struct {
	File     string  `json:"file"`
	Messages uint64  `json:"messages"`
	Bytes    uint64  `json:"payload_bytes"`
	FirstSeq *uint64 `json:"first_seq"`
	LastSeq  *uint64 `json:"last_seq"`
}

var (
	_ kvcache.PayloadHandler = (*recorder)(nil)
	_ kvcache.BatchHandler   = (*recorder)(nil)
	_ kvcache.StatusHandler  = (*recorder)(nil)
)

// recorder writes what a client receives.
type recorder struct {
	limit uint64
	stop  func(error)

	mu    sync.Mutex
	out   *recording.Writer
	total recorded
	state string
	ended bool
}

func (r *recorder) HandlePayload(info kvcache.BatchInfo) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return nil
	}
	seq := info.Sequence
	err := r.out.Write(&recording.Record{
		ReceivedAt: info.ReceivedAt, Topic: string(info.Topic), Seq: seq, HasSeq: true, Payload: info.Payload,
	})
	if err != nil {
		r.fail(err)
		return nil // the command reports it
	}
	r.total.Messages++
	r.total.Bytes += uint64(len(info.Payload))
	if r.total.FirstSeq == nil {
		r.total.FirstSeq = &seq
	}
	r.total.LastSeq = &seq
	if r.total.Messages == r.limit {
		r.fail(errDone)
	}
	return nil
}

// fail ends the recording. r.mu is held.
func (r *recorder) fail(err error) {
	r.ended = true
	r.stop(err)
}

// HandleEvent is never called: batches come whole.
func (r *recorder) HandleEvent(kvcache.KVEvent) error { return nil }

// HandleBatch has nothing to do: HandlePayload was called before it.
func (r *recorder) HandleBatch(*event.Batch, kvcache.BatchInfo) error { return nil }

func (r *recorder) HandleStatus(s kvcache.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = s.State.String() + ", " + s.Bound.String()
}

// progress flushes, and returns how far the recording is.
func (r *recorder) progress() (recorded, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.out.Flush(); err != nil && !r.ended {
		r.fail(err)
	}
	return r.total, r.state
}

// close ends the recording and returns what it holds.
func (r *recorder) close() (recorded, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	return r.total, r.out.Close()
}

// size returns a number of bytes for people.
func size(n uint64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}
