// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// writes keeps what each Write brought.
type writes struct {
	mu  sync.Mutex
	all []string
}

func (w *writes) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, string(p))
	return len(p), nil
}

// expect checks how many writes there were, and the last of them.
func (w *writes) expect(t *testing.T, when string, n int, last string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) != n || w.all[n-1] != last {
		t.Fatalf("%s: %d writes: %.100q", when, len(w.all), w.all)
	}
}

func TestBurstWriterGathersBurstsAndHoldsNothingBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out writes
		w := newBurstWriter(&out, nil)
		say := func(s string) {
			if _, err := w.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(burstDelay)
		say("alone")
		out.expect(t, "a line that comes alone", 1, "alone")
		say("one ")
		say("two")
		out.expect(t, "a burst, at first", 1, "alone")
		time.Sleep(burstDelay)
		synctest.Wait()
		out.expect(t, "after the delay", 2, "one two")
		full := strings.Repeat("x", burstSize)
		say(full)
		out.expect(t, "a full buffer", 3, full)
		say("rest")
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		out.expect(t, "after Flush", 4, "rest")
		huge := strings.Repeat("x", 20*burstSize)
		say(huge)
		out.expect(t, "a huge line", 5, huge)
		if w.buf != nil {
			t.Errorf("%d bytes are kept for the next line", cap(w.buf))
		}
	})
}

func TestBurstWriterTellsOfAnErrorOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		told := make(chan error, 9)
		w := newBurstWriter(failingWriter{errDiskFull}, func(err error) { told <- err })
		if _, err := w.Write([]byte("later")); err != nil {
			t.Fatalf("a line that waits: %v", err)
		}
		time.Sleep(burstDelay)
		synctest.Wait()
		if _, err := w.Write([]byte("after")); !errors.Is(err, errDiskFull) {
			t.Errorf("Write: %v", err)
		}
		if err := w.Flush(); !errors.Is(err, errDiskFull) {
			t.Errorf("Flush: %v", err)
		}
		if err := <-told; !errors.Is(err, errDiskFull) || len(told) > 0 {
			t.Errorf("told of %v and of %d more", err, len(told))
		}
	})
}

func TestInterruptibleReaderReadsEverything(t *testing.T) {
	t.Parallel()
	want := strings.Repeat("0123456789", 50_000)
	for _, r := range []io.Reader{
		strings.NewReader(want), iotest.DataErrReader(strings.NewReader(want)),
		iotest.HalfReader(strings.NewReader(want)),
	} {
		got, err := io.ReadAll(iotest.HalfReader(interruptible(t.Context(), r)))
		if err != nil || string(got) != want {
			t.Errorf("%T: %d bytes, %v", r, len(got), err)
		}
	}
}

func TestInterruptibleReaderLetsGo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		silent, keyboard := io.Pipe()
		r := interruptible(ctx, silent)
		go func() {
			time.Sleep(time.Second)
			cancel(errDone)
		}()
		if n, err := r.Read(make([]byte, 8)); n != 0 || !errors.Is(err, errDone) {
			t.Errorf("%d bytes, %v", n, err)
		}
		if n, err := r.Read(make([]byte, 8)); n != 0 || !errors.Is(err, errDone) {
			t.Errorf("again: %d bytes, %v", n, err)
		}
		_ = keyboard.Close() // the goroutine ends with its Read, or the bubble would not
	})
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1500: "1.5 kB", 2_500_000: "2.5 MB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	line := []byte(strings.TrimSpace(benchmarkLine) + "\n")
	in := bytes.Repeat(line, 1<<20/len(line))
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		if code := run(b.Context(), []string{"decode"}, bytes.NewReader(in), io.Discard, io.Discard); code != exitDone {
			b.Fatal(code)
		}
	}
}

// benchmarkLine is a batch as vLLM 0.32 sends it for a prompt of two blocks.
var benchmarkLine = "7 " + stored(1)
