// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux && !darwin

package interop

// Pause stops the peer as SIGSTOP does, and returns when it stands still: from then on it does nothing until Continue.
// What it is told meanwhile it does then. On systems without that signal the test is skipped.
func (p *Peer) Pause() {
	p.tb.Helper()
	p.tb.Skip("no SIGSTOP on this system")
}

// Continue ends Pause.
func (p *Peer) Continue() {}
