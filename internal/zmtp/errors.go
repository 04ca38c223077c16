// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"errors"
	"fmt"
	"strings"
)

var (
	// ErrClosed is returned by calls on a connection or socket that was closed on this side.
	ErrClosed = errors.New("zmtp: closed")
	// ErrSilent says that the peer sent nothing in the time that it had to show that it is alive.
	ErrSilent = errors.New("zmtp: peer is silent")
	// ErrTooLarge says that the peer sent more than a limit allows: a message, its frames, a command, subscriptions.
	ErrTooLarge = errors.New("zmtp: too large")
	// ErrNotZMTP says that whatever answers on the port does not speak ZMTP.
	ErrNotZMTP = errors.New("zmtp: not a ZMTP peer")
	// ErrVersion says that the peer speaks a ZMTP older than 3.0.
	ErrVersion = errors.New("zmtp: peer is too old")
	// ErrMechanism says that the two sides do not agree on a security mechanism.
	ErrMechanism = errors.New("zmtp: security mechanisms differ")
	// ErrSocketType says that the peer is a socket that ours cannot talk to, as when two ports were swapped.
	ErrSocketType = errors.New("zmtp: peer's socket type does not fit")
	// ErrRefused says that the peer answered with an ERROR command.
	ErrRefused = errors.New("zmtp: peer refused")
	// ErrMalformed says that the peer broke the rules of ZMTP.
	ErrMalformed = errors.New("zmtp: malformed input")
	// ErrEndpoint says that an endpoint cannot be read or used as asked.
	ErrEndpoint = errors.New("zmtp: bad endpoint")
)

// ProtocolError reports what a peer sent and what was expected of it. It matches the sentinel in Kind.
type ProtocolError struct {
	Kind error  // ErrNotZMTP, ErrVersion, ErrMechanism, ErrSocketType, ErrRefused or ErrMalformed
	Got  string // what was seen
	Want string // what was expected instead
	Hint string // what to look at, or empty
}

func (e *ProtocolError) Error() string {
	s := fmt.Sprintf("%v: got %s", e.Kind, e.Got)
	if e.Want != "" {
		s += ", expected " + e.Want
	}
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap returns the kind of the error.
func (e *ProtocolError) Unwrap() error { return e.Kind }

func malformed(got, want string) error {
	return &ProtocolError{Kind: ErrMalformed, Got: got, Want: want}
}

// atEndpoint says which endpoint an error is about.
type atEndpoint struct {
	endpoint string
	err      error
}

func (e *atEndpoint) Error() string {
	return "zmtp: " + e.endpoint + ": " + strings.TrimPrefix(e.err.Error(), "zmtp: ")
}
func (e *atEndpoint) Unwrap() error { return e.err }
