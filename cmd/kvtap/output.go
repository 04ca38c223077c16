// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// lockedWriter lets goroutines share a writer, a Write at a time.
type lockedWriter struct {
	mu  sync.Mutex
	out io.Writer
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// Unwrap returns the writer that is shared, to find out about terminals.
func (w *lockedWriter) Unwrap() io.Writer { return w.out }

const (
	// burstDelay is the longest that a line waits for others to be written with it.
	burstDelay = 20 * time.Millisecond
	burstSize  = 64 << 10
)

// burstWriter writes what comes alone at once, and what comes in bursts together, never later than burstDelay. It is
// safe for concurrent use.
type burstWriter struct {
	mu      sync.Mutex
	out     io.Writer
	buf     []byte
	flushed time.Time
	timer   *time.Timer // armed while buf is not empty
	err     error
	failed  func(error)
}

// newBurstWriter writes to out. failed, if not nil, is told once of the first error, perhaps by another goroutine. The
// first line waits for others: a reader that is stuck from the start then holds up nobody who can be interrupted.
func newBurstWriter(out io.Writer, failed func(error)) *burstWriter {
	return &burstWriter{out: out, failed: failed, flushed: time.Now()}
}

// Write takes p as a whole. An error may be that of an earlier Write.
func (w *burstWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return 0, w.err
	}
	w.buf = append(w.buf, p...)
	if len(w.buf) >= burstSize || time.Since(w.flushed) >= burstDelay {
		w.flush()
	} else if w.timer == nil {
		w.timer = time.AfterFunc(burstDelay, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.flush()
		})
	}
	return len(p), w.err
}

// Flush writes what waits.
func (w *burstWriter) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flush()
	return w.err
}

// flush writes while w.mu is held: a reader that is slow makes writers wait.
func (w *burstWriter) flush() {
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	if len(w.buf) > 0 && w.err == nil {
		if _, w.err = w.out.Write(w.buf); w.err != nil && w.failed != nil {
			w.failed(w.err)
		}
	}
	w.buf = w.buf[:0]
	if cap(w.buf) > 16*burstSize {
		w.buf = nil
	}
	w.flushed = time.Now()
}

// readerGone reports whether err says that nobody reads the output any more.
func readerGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe)
}

// isTerminal reports whether w or r goes to a person.
func isTerminal(stream any) bool {
	if w, ok := stream.(interface{ Unwrap() io.Writer }); ok {
		stream = w.Unwrap()
	}
	f, ok := stream.(*os.File)
	if !ok || f.Name() == os.DevNull {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// colourful reports whether to colour what goes to w, by the rules of no-color.org.
func colourful(w io.Writer) bool {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" || !isTerminal(w) {
		return false
	}
	// The old Windows console shows the codes instead of the colours.
	return runtime.GOOS != "windows" || os.Getenv("WT_SESSION") != ""
}
