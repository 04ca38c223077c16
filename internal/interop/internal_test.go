// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// fake is a test that notes how it ended.
type fake struct {
	testing.TB
	said string
}

func (f *fake) Helper() {}
func (f *fake) Fatalf(format string, args ...any) {
	f.said = "fatal: " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}
func (f *fake) Skipf(format string, args ...any) {
	f.said = "skip: " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// end runs what should end a test and returns how it did.
func end(tb testing.TB, run func(f *fake)) string {
	f := &fake{TB: tb}
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(f)
	}()
	<-done
	return f.said
}

func TestATestWithoutPythonIsSkippedUnlessItMustRun(t *testing.T) {
	t.Parallel()
	path, problem := find("/no/such/python", "false")
	if path != "" || !strings.Contains(problem, "/no/such/python: ") || !strings.Contains(problem, "; false: ") {
		t.Errorf("path %q, problem %q", path, problem)
	}
	for _, test := range []struct {
		required bool
		want     string
	}{{false, "skip: no python with pyzmq"}, {true, "fatal: no python with pyzmq"}} {
		got := end(t, func(f *fake) { without(f, problem, test.required) })
		if !strings.HasPrefix(got, test.want) || !strings.Contains(got, problem) {
			t.Errorf("required %v: %s", test.required, got)
		}
	}
}

func TestAPeerThatIsGoneFailsTheTest(t *testing.T) {
	t.Parallel()
	p := Start(t, "sub", "--connect", "tcp://127.0.0.1:1")
	p.Stop()
	for name, run := range map[string]func(p *Peer){
		"Line":     func(p *Peer) { p.Line() },
		"Expect":   func(p *Peer) { p.Expect("message") },
		"Endpoint": func(p *Peer) { p.Endpoint("moon") },
		"Say":      func(p *Peer) { p.Say("send") },
	} {
		got := end(t, func(f *fake) {
			gone := *p
			gone.tb = f
			run(&gone)
		})
		if !strings.HasPrefix(got, "fatal: peer.py sub --connect tcp://127.0.0.1:1 ") {
			t.Errorf("%s: %q", name, got)
		}
	}
}
