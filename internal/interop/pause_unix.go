// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux || darwin

package interop

import (
	"errors"
	"strings"
	"syscall"
)

// Pause stops the peer as SIGSTOP does, and returns when it stands still: from then on it does nothing until Continue.
// What it is told meanwhile it does then. On systems without that signal the test is skipped.
func (p *Peer) Pause() {
	p.tb.Helper()
	err := p.process.Signal(syscall.SIGSTOP)
	for err == nil {
		var status syscall.WaitStatus
		_, err = syscall.Wait4(p.process.Pid, &status, syscall.WUNTRACED, nil)
		if err == nil && status.Stopped() {
			return
		}
		if errors.Is(err, syscall.EINTR) {
			err = nil
		}
	}
	p.tb.Fatalf("peer.py %s cannot be stopped: %v", strings.Join(p.args, " "), err)
}

// Continue ends Pause.
func (p *Peer) Continue() {
	p.tb.Helper()
	if err := p.process.Signal(syscall.SIGCONT); err != nil {
		p.tb.Fatalf("peer.py %s cannot go on: %v", strings.Join(p.args, " "), err)
	}
}
