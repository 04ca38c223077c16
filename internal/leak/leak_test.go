// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"flag"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
)

func TestCheckFindsAGoroutineThatCannotGoOn(t *testing.T) {
	var complaints strings.Builder
	if code := run(tests(func() int { return 0 }), &complaints); code != 0 || complaints.Len() > 0 {
		t.Fatalf("nothing leaked: %d %s", code, &complaints)
	}
	if code := run(tests(func() int { return 3 }), &complaints); code != 3 {
		t.Fatalf("tests that fail: %d", code)
	}
	before := runtime.NumGoroutine()
	if err := counted(before); err != nil {
		t.Fatal(err)
	}
	patience = 0
	want := "goroutines where there were"
	if pprof.Lookup("goroutineleak") != nil {
		want = "1 goroutines are blocked for ever"
	}
	code := run(tests(func() int { leave(); return 0 }), &complaints)
	if err := counted(before); err == nil || !strings.Contains(err.Error(), "goroutines where there were") {
		t.Errorf("a leaked goroutine, by the count: %v", err)
	}
	if err := blocked(pprof.Lookup("goroutine")); err == nil { // in which every goroutine is
		t.Error("goroutines that a profile shows are no error")
	}
	if got := complaints.String(); code != 1 || !strings.Contains(got, want) || !strings.Contains(got, "leave") {
		t.Errorf("a leaked goroutine: %d %s", code, got)
	}
}

type tests func() int

func (f tests) Run() int { return f() }

// leave leaks a goroutine; nothing else knows its channel.
func leave() {
	never := make(chan struct{})
	go func() { <-never }()
	runtime.Gosched()
}

func TestAFuzzersOwnGoroutinesDoNotCount(t *testing.T) {
	for _, arg := range []string{"", "-test.fuzz=FuzzRecv", "-test.fuzzworker"} {
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		flags.String("test.fuzz", "", "")
		flags.Bool("test.fuzzworker", false, "")
		if err := flags.Parse(strings.Fields(arg)); err != nil {
			t.Fatal(err)
		}
		if got := fuzzes(flags); got != (arg != "") {
			t.Errorf("%q: a fuzzer runs: %v", arg, got)
		}
	}
}

func TestTotalOfAProfile(t *testing.T) {
	for text, want := range map[string]int{"goroutine profile: total 7\nrest": 7, "nothing": -1, "": -1} {
		if got := total(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
