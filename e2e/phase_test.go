// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/kvcache"
)

// scene is one engine and the clients that follow it, taken through phases.
type scene struct {
	name   string
	t      *testing.T // lives as long as the engine
	engine *engine
	table  *table
	// following are held against the truth after every phase, left after the present one for the last time, with as much
	// as they have.
	following, left []*follower
	// expected are the resets that each of them, by name, must be told in the present phase.
	expected map[string][]kvcache.Reason
}

// phase is what a scene goes through next. With exact set, nothing in it makes a fold uncertain.
type phase struct {
	name  string
	exact bool
	play  func(ctx context.Context, t *testing.T)
	// premise says what is missing of what the phase was to bring about, or nothing.
	premise func(c *comparison, seen counts) string
}

// play takes the scene through phases until one fails, each a subtest.
func (s *scene) play(t *testing.T, phases []phase) {
	ctx, cancel := deadline(t)
	defer cancel()
	for _, p := range phases {
		if !t.Run(p.name, func(t *testing.T) { s.playOne(ctx, t, &p) }) {
			t.Fatalf("%s: no further phases", s.name)
		}
	}
}

func (s *scene) playOne(ctx context.Context, t *testing.T, p *phase) {
	began := time.Now()
	s.expected = map[string][]kvcache.Reason{}
	p.play(ctx, t)
	var c comparison
	var seen counts
	resets := 0
	for _, f := range s.following {
		f.settle(ctx, t)
	}
	for _, f := range append(s.left, s.following...) {
		f.compare(t, p.exact, &c)
		wrong, told, news := f.report()
		seen.add(news, counts{})
		for _, w := range wrong {
			t.Errorf("%s: %s", f.name, w)
		}
		if want := s.expected[f.name]; !slices.Equal(told, want) {
			t.Errorf("%s was told of the resets %q, want %q", f.name, told, want)
		}
		resets += len(told)
	}
	s.left = nil
	if p.premise != nil {
		if missing := p.premise(&c, seen); missing != "" {
			t.Errorf("the phase did not bring about what it is for: %s", missing)
		}
	}
	if c.batches == 0 {
		t.Error("nothing was compared")
	}
	s.table.add(row{s.name, p.name, seen, resets, c, time.Since(began)})
}

// follow starts a client of one rank of the engine, through proxies if there are any, which stops with t.
func (s *scene) follow(t *testing.T, name string, rank int, through ...*interop.Proxy) *follower {
	t.Helper()
	f := follow(t, s.engine, name, rank, through...)
	s.following = append(s.following, f)
	s.expected[name] = []kvcache.Reason{kvcache.ReasonStart}
	return f
}

// leave ends the comparing of f with this phase.
func (s *scene) leave(f *follower) {
	s.following = slices.DeleteFunc(s.following, func(other *follower) bool { return other == f })
	s.left = append(s.left, f)
}

// add adds what was seen between two moments.
func (c *counts) add(now, before counts) {
	c.batches += now.batches - before.batches
	c.replayed += now.replayed - before.replayed
	c.stored += now.stored - before.stored
	c.removed += now.removed - before.removed
	c.cleared += now.cleared - before.cleared
	c.replays += now.replays - before.replays
}

// deadline returns a context that ends early enough before the test's own deadline for engines to be stopped and
// differences to be shown.
func deadline(t *testing.T) (context.Context, context.CancelFunc) {
	end, ok := t.Deadline()
	if !ok {
		return context.WithCancel(t.Context())
	}
	return context.WithDeadline(t.Context(), end.Add(-20*time.Second))
}

// table collects a row per phase. Safe for concurrent use.
type table struct {
	mu   sync.Mutex
	rows []row
}

type row struct {
	scene, phase string
	seen         counts
	resets       int
	comparison   comparison
	took         time.Duration
}

func (tb *table) add(r row) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	tb.rows = append(tb.rows, r)
}

// print writes the table, by scene.
func (tb *table) print(out io.Writer) error {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	slices.SortStableFunc(tb.rows, func(a, b row) int { return strings.Compare(a.scene, b.scene) })
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "batches\treplayed\treplays\tresets\tblocks\tuncertain\tdifferences\tseconds\t  phase")
	line := func(name string, r *row) {
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\t%d\t%d\t%.1f\t  %s\n", r.seen.batches, r.seen.replayed, r.seen.replays, r.resets,
			r.comparison.blocks, r.comparison.uncertain, r.comparison.differences, r.took.Seconds(), name)
	}
	var all row
	for i := range tb.rows {
		r := &tb.rows[i]
		line(r.scene+": "+r.phase, r)
		all.seen.add(r.seen, counts{})
		all.resets += r.resets
		all.comparison.blocks += r.comparison.blocks
		all.comparison.uncertain += r.comparison.uncertain
		all.comparison.differences += r.comparison.differences
		all.took += r.took
	}
	line("all of it", &all)
	return w.Flush()
}
