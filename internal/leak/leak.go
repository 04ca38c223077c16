// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package leak fails a package's tests if they leave goroutines behind. Only tests import it.
//
// Built with GOEXPERIMENT=goroutineleakprofile, the runtime itself tells which goroutines can never go on. Otherwise
// they are counted.
package leak

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Main is a TestMain: it runs the tests, then looks for goroutines.
func Main(m *testing.M) { os.Exit(run(m, os.Stderr)) }

func run(m interface{ Run() int }, complaints io.Writer) (code int) {
	before := runtime.NumGoroutine()
	if code := m.Run(); code != 0 || fuzzes(flag.CommandLine) {
		return code
	}
	if err := Check(before); err != nil {
		fmt.Fprintln(complaints, err)
		return 1
	}
	return 0
}

// fuzzes reports whether a fuzzer runs, which has goroutines of its own.
func fuzzes(flags *flag.FlagSet) bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flags.Lookup(name); f != nil && f.Value.String() != "" && f.Value.String() != "false" {
			return true
		}
	}
	return false
}

// patience is how long goroutines that are on their way out may take.
var patience = 10 * time.Second

// Check returns an error that shows the goroutines that leaked: those that are blocked for ever or, where the runtime
// cannot tell, those beyond the given number.
func Check(before int) error {
	if p := pprof.Lookup("goroutineleak"); p != nil {
		return blocked(p)
	}
	return counted(before)
}

// blocked asks the runtime.
func blocked(p *pprof.Profile) error {
	var text strings.Builder
	_ = p.WriteTo(&text, 1) // a Builder takes everything
	if n := total(text.String()); n != 0 {
		return fmt.Errorf("leak: %d goroutines are blocked for ever:\n%s", n, &text)
	}
	return nil
}

// counted waits until there are no more than before.
func counted(before int) error {
	for deadline := time.Now().Add(patience); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(deadline) {
			var text strings.Builder
			_ = pprof.Lookup("goroutine").WriteTo(&text, 1)
			return fmt.Errorf("leak: %d goroutines where there were %d:\n%s", runtime.NumGoroutine(), before, &text)
		}
	}
	return nil
}

// total reads the first line of a profile in text form, which ends with how many goroutines it shows; -1 if it does
// not.
func total(profile string) int {
	line, _, _ := strings.Cut(profile, "\n")
	n, err := strconv.Atoi(line[strings.LastIndexByte(line, ' ')+1:])
	if err != nil {
		return -1
	}
	return n
}
