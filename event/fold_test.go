// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
)

func TestFoldOfARecordedStreamIsWhatTheEngineHeld(t *testing.T) {
	t.Parallel()
	for _, name := range streamNames(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var f event.Fold
			var b event.Batch
			for i, payload := range stream(t, name) {
				if err := b.Decode(payload); err != nil || len(b.Skipped) > 0 || b.UnknownFields > 0 {
					t.Fatalf("batch %d: error %v, skipped %v, %d unknown fields", i, err, b.Skipped, b.UnknownFields)
				}
				f.Apply(&b)
			}
			if f.UnmatchedRemoves() > 0 || f.Overflowed() > 0 {
				t.Errorf("%d unmatched removals, %d overflowed", f.UnmatchedRemoves(), f.Overflowed())
			}
			byGroup, byMedium := map[hashAndRest]event.Copies{}, map[hashAndRest]event.Copies{}
			add := func(to map[hashAndRest]event.Copies, key hashAndRest, c event.Copies) {
				to[key] = event.Copies{Lower: to[key].Lower + c.Lower, Upper: to[key].Upper + c.Upper}
			}
			for p, c := range f.All() {
				// The files name an absent group 0.
				add(byGroup, hashAndRest{p.Hash, strconv.FormatInt(p.Group.V, 10)}, c)
				add(byMedium, hashAndRest{p.Hash, p.Medium.V}, c)
			}
			groups, media := truth(t, name+".truth.json"), truth(t, name+".media.json")
			if groups == nil && !strings.Contains(name, "queries") {
				t.Error("no truth to compare with")
			}
			for _, c := range []struct {
				want map[hashAndRest]int64
				got  map[hashAndRest]event.Copies
			}{{groups, byGroup}, {media, byMedium}} {
				if c.want == nil {
					continue
				}
				for key, n := range c.want {
					if _, ok := c.got[key]; !ok {
						t.Errorf("%v: the engine held %d, the fold has none", key, n)
					}
				}
				reports := strings.Contains(name, "fullreport")
				for key, got := range c.got {
					n := c.want[key]
					unsure := !reports && n != got.Upper || reports && n > 0 && got.Lower == 0
					if n < got.Lower || n > got.Upper || unsure {
						t.Errorf("%v: the engine held %d, the fold has %+v", key, n, got)
					}
				}
			}
		})
	}
}

// naive is a Fold in maps and loops, with the rules in the words of docs/wire-formats.md.
type naive struct {
	copies    map[event.Place]event.Copies
	groups    map[int64]naiveGroup
	unmatched uint64
}

type naiveGroup struct {
	kind   string
	window int64 // in blocks; -1 if there is no bound
}

func newNaive() *naive {
	return &naive{copies: map[event.Place]event.Copies{}, groups: map[int64]naiveGroup{}}
}

func placeOf(e *event.Event, h event.Hash) event.Place {
	p := event.Place{Hash: h, Group: e.Group, Medium: event.Opt[string]{V: string(e.Medium), OK: e.Medium != nil}}
	if string(e.Locality) == "REMOTE" {
		p.Medium = event.Some(p.Medium.V + "@REMOTE")
	}
	return p
}

func (n *naive) apply(b *event.Batch) {
	for i := range b.Events {
		e := &b.Events[i]
		if e.Type != event.BlockStored || !e.Group.OK {
			continue
		}
		g, known := n.groups[e.Group.V]
		if !known {
			g.window = -1
		}
		switch kind := string(e.SpecKind); kind {
		case "":
		case "full_attention", "mla_attention", "sink_full_attention":
			g = naiveGroup{"full", -1}
		case "mamba":
			g = naiveGroup{kind, 1}
		case "sliding_window":
			if g.kind != kind && g.kind != "mamba" {
				g.window = -1
			}
			g.kind = kind
			if e.SlidingWindow.V > 0 && e.BlockSize.V > 0 {
				g.window = 0
				for g.window*e.BlockSize.V < e.SlidingWindow.V-1 {
					g.window++
				}
			}
		default:
			g = naiveGroup{kind, -1}
		}
		n.groups[e.Group.V] = g
	}
	// before[i] is the upper counts before event i.
	upper := map[event.Place]int64{}
	for p, c := range n.copies {
		upper[p] = c.Upper
	}
	var before []map[event.Place]int64
	for i := range b.Events {
		before = append(before, maps.Clone(upper))
		for _, h := range b.Events[i].Hashes {
			p := placeOf(&b.Events[i], h)
			if b.Events[i].Type == event.BlockStored {
				upper[p]++
			} else {
				upper[p] = max(upper[p]-1, 0)
			}
		}
		if b.Events[i].Type == event.AllBlocksCleared {
			clear(upper)
		}
	}
	// held reports whether group g held all of e's blocks before event i.
	held := func(i int, g int64, e *event.Event) bool {
		for _, h := range e.Hashes {
			p := placeOf(e, h)
			p.Group = event.Some(g)
			if before[i][p] == 0 {
				return false
			}
		}
		return true
	}
	root := func(e *event.Event) bool {
		return e.Type == event.BlockStored && e.Map && e.Group.OK && !e.Parent.OK && len(e.Hashes) > 0
	}
	for i := range b.Events {
		e := &b.Events[i]
		ambiguous := root(e) && len(e.Tokens) > 0 && held(i, e.Group.V, e)
		if root(e) && len(e.Tokens) > 0 && len(n.groups) > 1 {
			everywhere, long := true, true
			for id, g := range n.groups {
				some, ok := false, false
				for k := range b.Events {
					s := &b.Events[k]
					same := placeOf(s, 0).Medium == placeOf(e, 0).Medium && slices.Equal(s.Hashes, e.Hashes)
					if root(s) && s.Group.V == id && same {
						some = true
						ok = ok || held(k, id, e)
					}
				}
				if id == e.Group.V {
					ok = held(i, id, e)
				}
				everywhere = everywhere && ok
				if g.kind == "full" {
					long = long && ok
				} else {
					long = long && some && g.window >= 0 && int64(len(e.Hashes)) > g.window
				}
			}
			ambiguous = everywhere || long
		}
		for _, h := range e.Hashes {
			p := placeOf(e, h)
			c, ok := n.copies[p]
			switch {
			case e.Type == event.BlockRemoved && !ok:
				n.unmatched++
				continue
			case e.Type == event.BlockRemoved:
				c.Upper--
				c.Lower = max(0, c.Lower-1)
			case !ambiguous:
				c.Upper++
				c.Lower++
			default:
				c.Upper++
				if len(n.groups) == 1 || n.groups[e.Group.V].kind == "full" {
					c.Lower = max(c.Lower, 1)
				}
			}
			n.copies[p] = c
			if c.Upper == 0 {
				delete(n.copies, p)
			}
		}
		if e.Type == event.AllBlocksCleared {
			clear(n.copies)
		}
	}
}

// runFoldScript turns bytes into batches and applies them to a Fold and the naive one.
func runFoldScript(t *testing.T, script []byte) {
	t.Helper()
	next := func(n int) int {
		if len(script) == 0 {
			return 0
		}
		v := int(script[0])
		script = script[1:]
		return v % n
	}
	kinds := []string{"full_attention", "sliding_window", "mamba", "chunked_local_attention", "", "mla_attention"}
	media := [][]byte{[]byte("GPU"), nil, []byte("CPU"), {}}
	groups := 1 + next(3)
	var f event.Fold
	model := newNaive()
	for step := 0; len(script) > 0; step++ {
		var b event.Batch
		for range 1 + next(6) {
			g := next(groups)
			e := event.Event{
				Type: event.BlockStored, Stride: 1, Map: next(16) > 0, BlockSize: event.Some(int64(next(3))),
				Group: event.Some(int64(g)), Medium: media[max(0, next(8)-4)],
				SpecKind: []byte(kinds[(g+next(8)/7)%len(kinds)]), SlidingWindow: event.Some(int64(next(6))),
			}
			if next(12) == 0 {
				e.Group = event.Opt[int64]{}
			}
			if next(12) == 0 {
				e.Locality = []byte("REMOTE")
			}
			// Prompts are 1, 1 2, 1 2 3 and so on, and sometimes others.
			for h := range next(5) {
				e.Hashes = append(e.Hashes, event.Hash(1+h+next(20)/19))
			}
			if next(10) > 0 {
				e.Tokens = []uint32{1}
			}
			switch next(12) {
			case 0, 1, 2:
				e.Type = event.BlockRemoved
			case 3:
				e.Parent = event.Some(event.Hash(9))
			case 4:
				if next(4) == 0 {
					e = event.Event{Type: event.AllBlocksCleared}
				}
			}
			b.Events = append(b.Events, e)
			// As hybrid engines do, say it for the other groups too.
			if next(3) > 0 {
				for other := range groups {
					if other != g {
						e.Group, e.SpecKind = event.Some(int64(other)), []byte(kinds[other])
						b.Events = append(b.Events, e)
					}
				}
			}
		}
		f.Apply(&b)
		model.apply(&b)
		got := maps.Collect(f.All())
		if diff := cmp.Diff(model.copies, got); diff != "" {
			t.Fatalf("step %d, after %+v (-naive +fold):\n%s", step, b.Events, diff)
		}
		if f.Len() != len(got) || f.UnmatchedRemoves() != model.unmatched || f.Overflowed() != 0 {
			t.Fatalf("step %d: %d places, want %d; %d unmatched, want %d", step, f.Len(), len(got),
				f.UnmatchedRemoves(),
				model.unmatched)
		}
		if next(40) == 1 {
			f.Clear()
			clear(model.copies)
			clear(model.groups)
		}
	}
}

func TestFoldAgreesWithANaiveOne(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 0))
		script := make([]byte, 2000)
		for i := range script {
			script[i] = byte(r.Uint32())
		}
		runFoldScript(t, script)
	}
}

func FuzzFold(f *testing.F) {
	f.Add([]byte("a script of a few batches, of which none is long"))
	f.Fuzz(runFoldScript)
}

// store is a store of a prompt's first blocks in a group, as vLLM's maps tell it.
func store(group int64, kind string, hashes ...event.Hash) event.Event {
	return event.Event{
		Type: event.BlockStored, Map: true, Stride: 1, Medium: []byte("GPU"), BlockSize: event.Some(int64(4)),
		Group: event.Some(group), SpecKind: []byte(kind), SlidingWindow: event.Some(int64(9)),
		Hashes: hashes, Tokens: []uint32{1},
	}
}

func remove(group int64, hashes ...event.Hash) event.Event {
	return event.Event{
		Type: event.BlockRemoved, Map: true, Medium: []byte("GPU"), Group: event.Some(group), Hashes: hashes,
	}
}

func TestFoldTellsAReportFromAStore(t *testing.T) {
	t.Parallel()
	// The window is two blocks long.
	const full, windowed, chunked = "full_attention", "sliding_window", "chunked_local_attention"
	asArray := func(e event.Event) event.Event { e.Map = false; return e }
	asChild := func(e event.Event) event.Event { e.Parent = event.Some(event.Hash(7)); return e }
	withoutTokens := func(e event.Event) event.Event { e.Tokens = []uint32{}; return e }
	onCPU := func(e event.Event) event.Event { e.Medium = []byte("CPU"); return e }
	offloaded := func(e event.Event) event.Event { e.BlockSize.V = 0; return onCPU(withoutTokens(e)) }
	type batches = [][]event.Event
	type held = map[string]event.Copies // by group and hash, media added up
	for _, c := range []struct {
		name    string
		batches batches
		want    held
	}{
		{"a first store", batches{{store(0, full, 1, 2)}}, held{"0:1": {1, 1}, "0:2": {1, 1}}},
		{
			"a store of what is held may be a report",
			batches{{store(0, full, 1, 2)}, {store(0, full, 1, 2)}, {store(0, full, 1)}},
			held{"0:1": {1, 3}, "0:2": {1, 2}},
		},
		{
			"a store of more than is held is none",
			batches{{store(0, full, 1)}, {store(0, full, 1, 2)}},
			held{"0:1": {2, 2}, "0:2": {1, 1}},
		},
		{
			"a report may name what the same batch stored",
			batches{{store(0, full, 1), store(0, full, 1, 2), store(0, full, 1, 2)}},
			held{"0:1": {2, 3}, "0:2": {1, 2}},
		},
		{
			"a store behind a clear in the same batch is a true one",
			batches{
				{store(0, full, 1, 2)},
				{{Type: event.AllBlocksCleared}, store(0, full, 1, 2)},
				{{Type: event.AllBlocksCleared}, store(0, full, 1, 2), store(0, full, 1)},
			},
			held{"0:1": {1, 2}, "0:2": {1, 1}},
		},
		{
			"a store behind the removal of the last copy in the same batch is a true one",
			batches{{store(0, full, 1)}, {remove(0, 1), store(0, full, 1)}, {remove(0, 1, 1), store(0, full, 1)}},
			held{"0:1": {1, 1}},
		},
		{
			"a store behind the removal of one of two copies may be a report",
			batches{{store(0, full, 1), asChild(store(0, full, 1))}, {remove(0, 1), store(0, full, 1)}},
			held{"0:1": {1, 2}},
		},
		{
			"stores of several groups behind a clear in the same batch are true ones",
			batches{
				{store(0, windowed, 1), store(1, full, 1)},
				{{Type: event.AllBlocksCleared}, store(0, windowed, 1), store(1, full, 1)},
			},
			held{"0:1": {1, 1}, "1:1": {1, 1}},
		},
		{
			"a removal lowers both counts",
			batches{{store(0, full, 1)}, {store(0, full, 1)}, {store(0, full, 1)}, {remove(0, 1)}},
			held{"0:1": {0, 2}},
		},
		{
			"a report of what is uncertain shows that it is held",
			batches{{store(0, full, 1)}, {store(0, full, 1)}, {remove(0, 1)}, {store(0, full, 1)}},
			held{"0:1": {1, 2}},
		},
		{
			"an array is no report",
			batches{{store(0, full, 1)}, {asArray(store(0, full, 1))}},
			held{"0:1": {2, 2}},
		},
		{
			"a store with a parent is no report",
			batches{{store(0, full, 1)}, {asChild(store(0, full, 1))}},
			held{"0:1": {2, 2}},
		},
		{
			"a store without tokens is no report",
			batches{{store(0, full, 1)}, {withoutTokens(store(0, full, 1))}},
			held{"0:1": {2, 2}},
		},
		{
			"a block held in another medium is not held",
			batches{{store(0, full, 1)}, {onCPU(store(0, full, 1))}},
			held{"0:1": {2, 2}},
		},
		{
			"a single windowed group is as any other",
			batches{{store(0, windowed, 1)}, {store(0, windowed, 1)}},
			held{"0:1": {1, 2}},
		},

		{
			"a report in two groups that hold all",
			batches{
				{store(0, full, 1), store(1, windowed, 1)},
				{store(0, full, 1), store(1, windowed, 1)},
			},
			held{"0:1": {1, 2}, "1:1": {1, 2}},
		},
		{
			"a store in one of two groups is no report",
			batches{{store(0, full, 1), store(1, windowed, 1)}, {store(0, full, 1)}},
			held{"0:1": {2, 2}, "1:1": {1, 1}},
		},
		{
			"stores of unlike lists are no report",
			batches{
				{store(0, full, 1, 2), store(1, windowed, 2)},
				{store(0, full, 1, 2), store(1, windowed, 2)},
			},
			held{"0:1": {2, 2}, "0:2": {2, 2}, "1:2": {2, 2}},
		},
		{
			"stores in unlike media are no report",
			batches{
				{store(0, full, 1), store(1, windowed, 1), onCPU(store(1, windowed, 1))},
				{store(0, full, 1), onCPU(store(1, windowed, 1))},
			},
			held{"0:1": {2, 2}, "1:1": {3, 3}},
		},
		{
			"a report longer than the window names blocks that are gone",
			batches{
				{store(0, full, 1, 2, 3), store(1, windowed, 2, 3)},
				{store(0, full, 1, 2, 3), store(1, windowed, 1, 2, 3)},
			},
			held{"0:1": {1, 2}, "0:2": {1, 2}, "0:3": {1, 2}, "1:1": {0, 1}, "1:2": {1, 2}, "1:3": {1, 2}},
		},
		{
			"a store within the window that the group does not hold is true",
			batches{
				{store(0, full, 1, 2), store(1, windowed, 2)},
				{store(0, full, 1, 2), store(1, windowed, 1, 2)},
			},
			held{"0:1": {2, 2}, "0:2": {2, 2}, "1:1": {1, 1}, "1:2": {2, 2}},
		},
		{
			"a list that full attention does not hold is true",
			batches{
				{store(0, full, 1), store(1, windowed, 3)},
				{store(0, full, 1, 2, 3), store(1, windowed, 1, 2, 3)},
			},
			held{"0:1": {2, 2}, "0:2": {1, 1}, "0:3": {1, 1}, "1:1": {1, 1}, "1:2": {1, 1}, "1:3": {2, 2}},
		},
		{
			"mamba keeps one block",
			batches{
				{store(0, full, 1, 2), store(1, "mamba", 2)},
				{store(0, full, 1, 2), store(1, "mamba", 1, 2)},
			},
			held{"0:1": {1, 2}, "0:2": {1, 2}, "1:1": {0, 1}, "1:2": {1, 2}},
		},
		{
			"chunked attention has no bound",
			batches{
				{store(0, full, 1, 2, 3), store(1, chunked, 3)},
				{store(0, full, 1, 2, 3), store(1, chunked, 1, 2, 3)},
			},
			held{"0:1": {2, 2}, "0:2": {2, 2}, "0:3": {2, 2}, "1:1": {1, 1}, "1:2": {1, 1}, "1:3": {2, 2}},
		},
		{
			"a report proves nothing about chunked attention",
			batches{
				{store(0, full, 1), store(1, chunked, 1)},
				{store(0, full, 1), store(1, chunked, 1)},
				{remove(1, 1)},
			},
			held{"0:1": {1, 2}, "1:1": {0, 1}},
		},
		{
			"two requests of one step, of which the second may be a report",
			batches{{store(0, full, 1), store(1, windowed, 1), store(0, full, 1), store(1, windowed, 1)}},
			held{"0:1": {1, 2}, "1:1": {1, 2}},
		},
		{
			"of two long lists in one batch the first may be true in full attention only",
			batches{
				{store(1, windowed, 9)},
				{store(0, full, 1, 2, 3), store(0, full, 1, 2, 3), store(1, windowed, 1, 2, 3)},
			},
			held{"0:1": {1, 2}, "0:2": {1, 2}, "0:3": {1, 2}, "1:1": {0, 1}, "1:2": {0, 1}, "1:3": {0, 1},
				"1:9": {1, 1}},
		},
		{
			"offloaded blocks do not change what is known of a window",
			batches{
				{store(0, full, 1, 2, 3), store(1, windowed, 2, 3), offloaded(store(1, windowed, 3))},
				{store(0, full, 1, 2, 3), store(1, windowed, 1, 2, 3)},
			},
			held{"0:1": {1, 2}, "0:2": {1, 2}, "0:3": {1, 2}, "1:1": {0, 1}, "1:2": {1, 2}, "1:3": {2, 3}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var f event.Fold
			for _, events := range c.batches {
				f.Apply(&event.Batch{Events: events})
			}
			got := map[string]event.Copies{}
			for p, c := range f.All() {
				key := fmt.Sprintf("%d:%d", p.Group.V, uint64(p.Hash))
				got[key] = event.Copies{Lower: got[key].Lower + c.Lower, Upper: got[key].Upper + c.Upper}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestFoldTellsPlacesApart(t *testing.T) {
	t.Parallel()
	var f event.Fold
	if f.Len() != 0 || len(f.Sorted()) != 0 || f.Copies(event.Place{}) != (event.Copies{}) {
		t.Error("the zero Fold is not empty")
	}
	f.Clear()
	var events []event.Event
	for _, group := range []event.Opt[int64]{event.Some(int64(1)), {}, event.Some(int64(-1))} {
		for _, medium := range [][]byte{[]byte("GPU"), nil, {}, []byte("CPU")} {
			for _, locality := range [][]byte{nil, []byte("REMOTE"), []byte("LOCAL")} {
				events = append(events, event.Event{
					Type: event.BlockStored, Hashes: []event.Hash{2, 1 << 63, 2},
					Group: group, Medium: medium, Locality: locality,
				})
			}
		}
	}
	f.Apply(&event.Batch{Events: events})
	var want []event.Held
	for _, hash := range []event.Hash{2, 1 << 63} {
		for _, group := range []event.Opt[int64]{{}, event.Some(int64(-1)), event.Some(int64(1))} {
			for _, medium := range []event.Opt[string]{
				{}, event.Some(""), event.Some("@REMOTE"), event.Some("CPU"), event.Some("CPU@REMOTE"),
				event.Some("GPU"), event.Some("GPU@REMOTE"),
			} {
				n := int64(2) // a locality of LOCAL is as none
				if strings.Contains(medium.V, "@") {
					n = 1
				}
				if medium.V == "@REMOTE" {
					n = 2 // of a medium that is nil and one that is empty
				}
				if hash == 2 {
					n *= 2
				}
				want = append(want, event.Held{Place: event.Place{Hash: hash, Group: group, Medium: medium},
					Copies: event.Copies{Lower: n, Upper: n}})
			}
		}
	}
	if diff := cmp.Diff(want, f.Sorted()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, h := range want {
		if got := f.Copies(h.Place); got != h.Copies {
			t.Errorf("%+v: %+v, want %+v", h.Place, got, h.Copies)
		}
	}
	if got := f.Copies(event.Place{Hash: 2, Medium: event.Some("DISK")}); got != (event.Copies{}) {
		t.Errorf("in a medium never named: %+v", got)
	}
	for range f.All() {
		break // must not go on
	}
	f.Apply(&event.Batch{Events: []event.Event{{Type: event.AllBlocksCleared}}})
	if f.Len() != 0 || f.UnmatchedRemoves() != 0 {
		t.Errorf("after a clear %d places, %d unmatched", f.Len(), f.UnmatchedRemoves())
	}
}

func TestFoldCountsARemovalOfWhatIsNotThere(t *testing.T) {
	t.Parallel()
	var f event.Fold
	stored := event.Event{Type: event.BlockStored, Hashes: []event.Hash{1}, Medium: []byte("CPU")}
	f.Apply(&event.Batch{Events: []event.Event{stored}})
	for _, e := range []event.Event{
		{Type: event.BlockRemoved, Hashes: []event.Hash{1}, Medium: []byte("GPU")},
		{Type: event.BlockRemoved, Hashes: []event.Hash{1}},
		{Type: event.BlockRemoved, Hashes: []event.Hash{1}, Medium: []byte("CPU"), Group: event.Some(int64(0))},
		{Type: event.BlockRemoved, Hashes: []event.Hash{2, 3}, Medium: []byte("CPU")},
		{Type: event.BlockRemoved, Medium: []byte("CPU")},
	} {
		f.Apply(&event.Batch{Events: []event.Event{e}})
	}
	if f.UnmatchedRemoves() != 5 || f.Len() != 1 {
		t.Errorf("%d unmatched, %d places", f.UnmatchedRemoves(), f.Len())
	}
	// The last copy goes, the next removal finds nothing.
	f.Apply(&event.Batch{Events: []event.Event{{Type: event.BlockRemoved, Hashes: []event.Hash{1, 1},
		Medium: []byte("CPU")}}})
	if f.UnmatchedRemoves() != 6 || f.Len() != 0 {
		t.Errorf("%d unmatched, %d places", f.UnmatchedRemoves(), f.Len())
	}
}

func TestFoldBoundsTheMediaOfAHostileEngine(t *testing.T) {
	t.Parallel()
	var f event.Fold
	apply := func(e event.Event) { f.Apply(&event.Batch{Events: []event.Event{e}}) }
	for i := range 1030 {
		apply(event.Event{Type: event.BlockStored, Hashes: []event.Hash{1}, Group: event.Some(int64(i))})
	}
	apply(event.Event{Type: event.BlockRemoved, Hashes: []event.Hash{1}, Group: event.Some(int64(1025))})
	if f.Len() != 1024 || f.Overflowed() != 6 || f.UnmatchedRemoves() != 1 {
		t.Errorf("%d places, %d overflowed, %d unmatched", f.Len(), f.Overflowed(), f.UnmatchedRemoves())
	}
	// Clearing is not another life, but Clear is.
	apply(event.Event{Type: event.AllBlocksCleared})
	apply(event.Event{Type: event.BlockStored, Hashes: []event.Hash{1}, Group: event.Some(int64(1025))})
	if f.Len() != 0 || f.Overflowed() != 7 {
		t.Errorf("after a clear %d places, %d overflowed", f.Len(), f.Overflowed())
	}
	f.Clear()
	apply(event.Event{Type: event.BlockStored, Hashes: []event.Hash{1}, Group: event.Some(int64(1025))})
	apply(event.Event{Type: event.BlockStored, Hashes: []event.Hash{1}, Medium: make([]byte, 257)})
	apply(event.Event{Type: event.BlockRemoved, Hashes: []event.Hash{1}, Medium: make([]byte, 257)})
	if f.Len() != 1 || f.Overflowed() != 8 || f.UnmatchedRemoves() != 2 {
		t.Errorf("%d places, %d overflowed, %d unmatched", f.Len(), f.Overflowed(), f.UnmatchedRemoves())
	}
}

func TestAnotherLifeMayHaveOtherGroups(t *testing.T) {
	t.Parallel()
	var f event.Fold
	apply := func(events ...event.Event) { f.Apply(&event.Batch{Events: events}) }
	place := event.Place{Hash: 1, Group: event.Some(int64(0)), Medium: event.Some("GPU")}
	apply(store(0, "full_attention", 1), store(1, "mamba", 1))
	apply(store(0, "full_attention", 1))
	if got := f.Copies(place); got != (event.Copies{Lower: 2, Upper: 2}) {
		t.Errorf("with two groups: %+v", got)
	}
	f.Clear()
	apply(store(0, "full_attention", 1))
	apply(store(0, "full_attention", 1))
	if got := f.Copies(place); got != (event.Copies{Lower: 1, Upper: 2}) {
		t.Errorf("with one group: %+v", got)
	}
}

// foldSteps are a store and a removal of it, by an engine of two groups.
func foldSteps() [2]event.Batch {
	hashes := prompt(512).Hashes
	windowed := hashes[14:]
	return [2]event.Batch{
		{Events: []event.Event{store(0, "full_attention", hashes...), store(1, "sliding_window", windowed...),
			store(0, "full_attention", hashes...)}},
		{Events: []event.Event{remove(0, hashes...), remove(1, windowed...), remove(0, hashes...)}},
	}
}

func TestFoldAllocatesNothingOnceWarm(t *testing.T) {
	var f event.Fold
	steps := foldSteps()
	if n := testing.AllocsPerRun(1000, func() {
		f.Apply(&steps[0])
		f.Apply(&steps[1])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if f.Len() != 0 || f.UnmatchedRemoves() != 0 {
		t.Errorf("%d places, %d unmatched", f.Len(), f.UnmatchedRemoves())
	}
}

func BenchmarkFold(b *testing.B) {
	var f event.Fold
	steps := foldSteps()
	b.ReportAllocs()
	for b.Loop() {
		f.Apply(&steps[0])
		f.Apply(&steps[1])
	}
}
