// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package leak

import (
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
	patience = 0
	want := "goroutines where there were"
	if pprof.Lookup("goroutineleak") != nil {
		want = "1 goroutines are blocked for ever"
	}
	code := run(tests(func() int { leave(); return 0 }), &complaints)
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

func TestTotalOfAProfile(t *testing.T) {
	for text, want := range map[string]int{"goroutine profile: total 7\nrest": 7, "nothing": -1, "": -1} {
		if got := total(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
