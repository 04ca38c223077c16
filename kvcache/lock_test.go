// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestLockExcludes(t *testing.T) {
	t.Parallel()
	l := newLock()
	var wg sync.WaitGroup
	n := 0
	for range 8 {
		wg.Go(func() {
			for range 10_000 {
				l.Lock()
				n++
				l.Unlock()
			}
		})
	}
	wg.Wait()
	if n != 80_000 {
		t.Errorf("counted to %d", n)
	}
}

func TestLockLetsTheClockOfABubbleGoOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLock()
		l.Lock()
		turns := 0
		for range 3 {
			go func() {
				l.Lock()
				defer l.Unlock()
				turns++
				time.Sleep(time.Hour)
			}()
		}
		time.Sleep(time.Hour)
		l.Unlock()
		time.Sleep(4 * time.Hour)
		l.Lock()
		if turns != 3 {
			t.Errorf("%d of 3 had their turn", turns)
		}
	})
}
