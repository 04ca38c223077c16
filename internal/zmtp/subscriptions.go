// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"fmt"
	"slices"
	"sync"
)

// subscriptions is the set of prefixes that one subscriber asked for. As in libzmq's PUB a second subscription to the
// same prefix changes nothing, since a SUB counts its own. Only the connection's reader adds and removes; any goroutine
// matches.
type subscriptions struct {
	mu       sync.Mutex
	prefixes map[string]struct{}
	lengths  []length // of the prefixes, rising
	bytes    int

	// changed is told the number of prefixes after each change, outside the lock: its owner holds locks while it matches.
	changed func(n int)
}

type length struct{ size, prefixes int }

func (s *subscriptions) add(prefix []byte) error {
	if _, known := s.prefixes[string(prefix)]; known {
		return nil
	}
	if len(s.prefixes) >= maxSubscriptions || s.bytes+len(prefix) > maxSubscriptionBytes {
		return fmt.Errorf("%w: more than %d subscriptions or %d bytes of them", ErrTooLarge, maxSubscriptions,
			maxSubscriptionBytes)
	}
	s.mu.Lock()
	if s.prefixes == nil {
		s.prefixes = make(map[string]struct{})
	}
	s.prefixes[string(prefix)] = struct{}{}
	s.bytes += len(prefix)
	i, known := s.length(len(prefix))
	if !known {
		s.lengths = slices.Insert(s.lengths, i, length{size: len(prefix)})
	}
	s.lengths[i].prefixes++
	s.mu.Unlock()
	s.tell()
	return nil
}

func (s *subscriptions) remove(prefix []byte) {
	if _, known := s.prefixes[string(prefix)]; !known {
		return
	}
	s.mu.Lock()
	delete(s.prefixes, string(prefix))
	s.bytes -= len(prefix)
	i, _ := s.length(len(prefix))
	if s.lengths[i].prefixes--; s.lengths[i].prefixes == 0 {
		s.lengths = slices.Delete(s.lengths, i, i+1)
	}
	s.mu.Unlock()
	s.tell()
}

func (s *subscriptions) length(n int) (int, bool) {
	return slices.BinarySearchFunc(s.lengths, n, func(l length, n int) int { return l.size - n })
}

func (s *subscriptions) tell() {
	if s.changed != nil {
		s.changed(len(s.prefixes))
	}
}

// match reports whether a message with this first frame was asked for.
func (s *subscriptions) match(topic []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lengths {
		if l.size > len(topic) {
			return false
		}
		if _, found := s.prefixes[string(topic[:l.size])]; found {
			return true
		}
	}
	return false
}
