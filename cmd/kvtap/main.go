// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Command kvtap shows, records, replays and simulates what LLM inference engines say about their KV cache.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	// The first signal asks for an end, the second one enforces it.
	context.AfterFunc(ctx, stop)
	// Without this a reader that went away would kill the process before it could end its files.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
