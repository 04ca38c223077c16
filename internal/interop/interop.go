// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package interop starts real libzmq peers for tests: peer.py, run by a Python that has pyzmq. Only tests import it.
//
// Without such a Python a test is skipped, or fails if KVTAP_REQUIRE_INTEROP is 1. KVTAP_PYTHON names the Python to
// use.
package interop

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

//go:embed peer.py
var peerPy string

// patience is how long a peer may take for one line: far more than it needs, so that only a dead one runs into it.
const patience = time.Minute

var python = sync.OnceValues(func() (path, problem string) {
	if named := os.Getenv("KVTAP_PYTHON"); named != "" {
		return find(named)
	}
	return find("python3", "/usr/bin/python3")
})

// find returns the first candidate that can import zmq, or what each said.
func find(candidates ...string) (path, problem string) {
	var problems []string
	for _, candidate := range candidates {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, candidate, "-c", "import zmq").CombinedOutput()
		if err == nil {
			return candidate, ""
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		problems = append(problems, candidate+": "+err.Error()+" "+lines[len(lines)-1])
	}
	return "", strings.Join(problems, "; ")
}

// Python returns a Python interpreter that can import zmq, or skips or fails the test.
func Python(tb testing.TB) string {
	tb.Helper()
	path, problem := python()
	if path == "" {
		without(tb, problem, os.Getenv("KVTAP_REQUIRE_INTEROP") == "1")
	}
	return path
}

// without ends a test that finds no Python.
func without(tb testing.TB, problem string, required bool) {
	tb.Helper()
	if required {
		tb.Fatalf("no python with pyzmq, and KVTAP_REQUIRE_INTEROP=1: %s", problem)
	}
	tb.Skipf("no python with pyzmq (Debian: python3-zmq): %s", problem)
}

// Peer is a running peer.py. Its methods fail the test on any trouble and belong to the test's goroutine.
type Peer struct {
	tb      testing.TB
	args    []string
	process *os.Process
	stdin   io.WriteCloser
	lines   chan string
	stop    func()
	ready   map[string]string
}

// Start starts peer.py with the arguments that its own text explains, and waits until it is ready. It is killed when
// the test ends.
func Start(tb testing.TB, args ...string) *Peer {
	tb.Helper()
	// The program comes in by argument, so that no file is left behind; stdin is for commands.
	cmd := exec.Command(Python(tb), append([]string{"-c", peerPy}, args...)...)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	stdin, inErr := cmd.StdinPipe()
	stdout, outErr := cmd.StdoutPipe()
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		tb.Fatal(err)
	}
	p := &Peer{tb: tb, args: args, process: cmd.Process, stdin: stdin, lines: make(chan string, 1024)}
	ended, read := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(read)
		defer close(p.lines)
		for in := bufio.NewReader(stdout); ; {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			select {
			case p.lines <- strings.TrimSuffix(line, "\n"):
			case <-ended:
				return
			}
		}
	}()
	p.stop = sync.OnceFunc(func() {
		close(ended)
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait() // killed, as it says
		if complaints.Len() > 0 {
			tb.Logf("peer.py %s: %s", strings.Join(args, " "), &complaints)
		}
	})
	tb.Cleanup(p.stop)

	p.ready = make(map[string]string)
	for word := range strings.FieldsSeq(p.Expect("ready")) {
		name, value, _ := strings.Cut(word, "=")
		p.ready[name] = value
	}
	return p
}

// Endpoint returns what the peer's ready line says under a name: "endpoint", or "pub" and "replay" for the publisher.
func (p *Peer) Endpoint(name string) string {
	p.tb.Helper()
	if p.ready[name] == "" {
		p.tb.Fatalf("peer.py %s reported no %s", strings.Join(p.args, " "), name)
	}
	return p.ready[name]
}

// Say sends one command.
func (p *Peer) Say(words ...string) {
	p.tb.Helper()
	if _, err := io.WriteString(p.stdin, strings.Join(words, " ")+"\n"); err != nil {
		p.tb.Fatalf("peer.py %s is gone: %v", strings.Join(p.args, " "), err)
	}
}

// Line returns the peer's next line.
func (p *Peer) Line() string {
	p.tb.Helper()
	select {
	case line, ok := <-p.lines:
		if ok {
			return line
		}
		p.stop()
		p.tb.Fatalf("peer.py %s ended", strings.Join(p.args, " "))
	case <-time.After(patience):
		p.tb.Fatalf("peer.py %s said nothing for %v", strings.Join(p.args, " "), patience)
	}
	return ""
}

// Expect returns what follows word on the peer's next line that begins with it, and passes over others.
func (p *Peer) Expect(word string) string {
	p.tb.Helper()
	for {
		line := p.Line()
		if first, rest, _ := strings.Cut(line, " "); first == word {
			return rest
		}
	}
}

// Stop kills the peer now, as a crash would.
func (p *Peer) Stop() { p.stop() }

// Restart kills the peer and starts another process with the same arguments, and args behind them, at the same
// endpoints.
func (p *Peer) Restart(args ...string) *Peer {
	p.tb.Helper()
	p.stop()
	again := slices.Clone(p.args)
	for name, option := range map[string]string{"endpoint": "--bind", "pub": "--pub", "replay": "--replay"} {
		if endpoint := p.ready[name]; endpoint != "" && !slices.Contains(p.args, "--connect") {
			again = append(again, option, endpoint)
		}
	}
	return Start(p.tb, append(again, args...)...)
}
