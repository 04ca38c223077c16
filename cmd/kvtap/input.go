// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/recording"
)

// input is a recording that is being read.
type input struct {
	*recording.Reader
	name string
	file *os.File // nil for standard input
	// stop lets go of the goroutine that reads.
	stop context.CancelFunc
}

// open opens a recording; "-" is standard input. Reading ends with the context's error when ctx does.
func (a *app) open(ctx context.Context, name string) (*input, error) {
	in := &input{name: name}
	source := a.stdin
	if name == "-" {
		in.name = "stdin"
		if isTerminal(a.stdin) {
			a.complain("reading from the terminal, one message per line; end with Ctrl-D")
		}
	} else {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		in.file, source = f, f
		if info, err := f.Stat(); err == nil && info.IsDir() {
			_ = f.Close()
			return nil, fmt.Errorf("%s is a directory; give a recording", name)
		}
	}
	ctx, in.stop = context.WithCancel(ctx)
	var err error
	if in.Reader, err = recording.NewReader(interruptible(ctx, source)); err != nil {
		in.close()
		return nil, fmt.Errorf("%s: %w", in.name, err)
	}
	return in, nil
}

func (in *input) close() {
	in.stop()
	if in.file != nil {
		_ = in.file.Close()
	}
}

// each calls f for every message. A line that cannot be read goes to bad, and the rest goes on; the error is one that
// ended the input early.
func (in *input) each(bad func(*recording.LineError), f func(*recording.Record) error) error {
	for {
		rec, err := in.Next()
		line := (*recording.LineError)(nil)
		switch {
		case err == nil:
			if err := f(rec); err != nil {
				return err
			}
		case errors.Is(err, io.EOF):
			return nil
		case errors.As(err, &line):
			bad(line)
		default:
			return fmt.Errorf("%s: %w", in.name, err)
		}
	}
}

// interruptible returns a reader that fails as soon as ctx ends, even while r waits for input, which no other way can
// end on a terminal or a pipe. Its goroutine may then stay behind in a Read of r until that returns.
func interruptible(ctx context.Context, r io.Reader) io.Reader {
	chunks := make(chan chunk)
	// Two buffers: one is being filled while the other is being read.
	free := make(chan []byte, 2)
	free <- make([]byte, chunkSize)
	free <- make([]byte, chunkSize)
	go func() {
		for {
			var buf []byte
			select {
			case buf = <-free:
			case <-ctx.Done():
				return
			}
			n, err := r.Read(buf[:chunkSize])
			select {
			case chunks <- chunk{buf[:n], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return &interruptibleReader{ctx: ctx, chunks: chunks, free: free}
}

const chunkSize = 64 << 10

type chunk struct {
	data []byte
	err  error
}

type interruptibleReader struct {
	ctx    context.Context
	chunks <-chan chunk
	free   chan<- []byte
	buf    []byte // whole buffer of current, to give back
	now    chunk
}

func (r *interruptibleReader) Read(p []byte) (int, error) {
	// A channel that is ready must not hide the interruption.
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	for len(r.now.data) == 0 {
		if r.now.err != nil {
			return 0, r.now.err
		}
		if r.buf != nil {
			r.free <- r.buf
			r.buf = nil
		}
		select {
		case r.now = <-r.chunks:
			r.buf = r.now.data[:0]
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
	n := copy(p, r.now.data)
	r.now.data = r.now.data[n:]
	return n, nil
}
