// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write golden files")

// patience is how long a test waits for what should come at once: far more than it takes.
const patience = time.Minute

// result is what a run of the program left behind.
type result struct {
	code           int
	stdout, stderr string
}

// kvtap runs the program to its end.
func kvtap(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), args, strings.NewReader(stdin), &stdout, &stderr)
	return result{code, stdout.String(), stderr.String()}
}

// golden compares got with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.ReplaceAll(string(want), "\r\n", "\n"), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// program is a run of the program that goes on.
type program struct {
	t         *testing.T
	interrupt context.CancelFunc
	lines     chan string
	ended     chan struct{}
	code      int
	stderr    *lockedBuffer
}

// start runs the program in the background; it is interrupted when the test ends.
func start(t *testing.T, args ...string) *program {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := &program{t: t, interrupt: cancel, lines: make(chan string), ended: make(chan struct{}),
		stderr: &lockedBuffer{}}
	out, in := io.Pipe()
	go func() {
		defer close(p.ended)
		defer func() { _ = in.Close() }()
		p.code = run(ctx, args, strings.NewReader(""), in, p.stderr)
	}()
	go func() {
		defer close(p.lines)
		scanner := bufio.NewScanner(out)
		scanner.Buffer(nil, 1<<24)
		for scanner.Scan() {
			select {
			case p.lines <- scanner.Text():
			case <-ctx.Done(): // nobody reads any more
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-p.ended
		if t.Failed() {
			t.Logf("kvtap %s: stderr:\n%s", strings.Join(args, " "), p.stderr)
		}
	})
	return p
}

// line returns the next line of the program's output.
func (p *program) line() string {
	p.t.Helper()
	select {
	case line, ok := <-p.lines:
		if !ok {
			p.t.Fatalf("the program ended; stderr:\n%s", p.stderr)
		}
		return line
	case <-time.After(patience):
		p.t.Fatalf("no line for %v; stderr:\n%s", patience, p.stderr)
	}
	return ""
}

// until returns the lines up to the first one that has text in it, that one included.
func (p *program) until(text string) []string {
	p.t.Helper()
	var lines []string
	for {
		lines = append(lines, p.line())
		if strings.Contains(lines[len(lines)-1], text) {
			return lines
		}
	}
}

// wait returns the exit code, when the program has ended by itself.
func (p *program) wait() int {
	p.t.Helper()
	for {
		select {
		case <-p.ended:
			return p.code
		case <-p.lines:
		case <-time.After(patience):
			p.t.Fatalf("the program did not end within %v", patience)
		}
	}
}

// stop interrupts the program and returns its exit code.
func (p *program) stop() int {
	p.t.Helper()
	p.interrupt()
	return p.wait()
}

// complains waits until the program has written text to stderr.
func (p *program) complains(text string) {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		grown := p.stderr.growth()
		if strings.Contains(p.stderr.String(), text) {
			return
		}
		select {
		case <-grown:
		case <-p.ended:
			p.t.Fatalf("ended with %d before stderr said %q:\n%s", p.code, text, p.stderr)
		case <-timeout:
			p.t.Fatalf("stderr does not say %q:\n%s", text, p.stderr)
		}
	}
}

// lockedBuffer is a buffer that may be read while a program writes to it.
type lockedBuffer struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{} // closed by the next Write; nil if nobody waits for it
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.grown != nil {
		close(b.grown)
		b.grown = nil
	}
	return b.buf.Write(p)
}

// growth returns a channel that is closed by the next Write.
func (b *lockedBuffer) growth() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.grown == nil {
		b.grown = make(chan struct{})
	}
	return b.grown
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// object is a JSON line.
type object map[string]any

func parse(t *testing.T, line string) object {
	t.Helper()
	var o object
	if err := json.Unmarshal([]byte(line), &o); err != nil {
		t.Fatalf("not JSON: %v: %s", err, line)
	}
	return o
}

// endpoints starts a simulated engine and returns where it publishes and replays.
func (p *program) endpoints() (pub, replay string) {
	p.t.Helper()
	o := parse(p.t, p.line())
	pub, _ = o["pub"].(string)
	replay, _ = o["replay"].(string)
	return pub, replay
}

// message is a line of a stream of testdata.
type message struct {
	seq, hex string
}

// streamMessages reads a stream `seq hex`.
func streamMessages(t *testing.T, path string) []message {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	scanner := bufio.NewScanner(unzipped)
	scanner.Buffer(nil, 1<<24)
	var messages []message
	for scanner.Scan() {
		seq, hex, _ := strings.Cut(scanner.Text(), " ")
		messages = append(messages, message{seq, hex})
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	return messages
}

// failingWriter fails as a closed pipe does, or a full disk.
type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// stuckWriter is a pipe that nobody reads.
type stuckWriter struct {
	once  sync.Once
	stuck chan struct{} // closed by the first Write
	free  <-chan struct{}
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.stuck) })
	<-w.free
	return len(p), nil
}

var errDiskFull = errors.New("no space left on device")
