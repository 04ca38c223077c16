// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event

import (
	"cmp"
	"iter"
	"slices"
)

const (
	// maxSlots bounds the pairs of group and medium that a Fold tells apart. Engines have a handful of each.
	maxSlots = 1024

	// maxMedium bounds the length in bytes of a medium's name.
	maxMedium = 256
)

// Place is where copies of a block are: the same hash in another group or medium is another place.
type Place struct {
	Hash  Hash
	Group Opt[int64]

	// Medium is as the engine sent it, with "@REMOTE" appended if the locality was REMOTE: such a block is not the
	// engine's own.
	Medium Opt[string]
}

// Copies says how many copies of a block an engine holds: at least Lower and at most Upper. They differ only after
// stores that may have been reports of blocks stored earlier.
type Copies struct{ Lower, Upper int64 }

// Held is a place and what is there.
type Held struct {
	Place
	Copies
}

// slot is a pair of group and medium. It has a number, so that the key of the multiset is small.
type slot struct {
	group  Opt[int64]
	medium Opt[string] // as in Place
}

// place is a Place, its group and medium by the number of their slot.
type place struct {
	hash Hash
	slot uint32
}

// group is what a Fold knows of a group of layers.
type group struct {
	full    bool  // full attention of any kind: it keeps every block of a prompt
	bounded bool  // no true store from the start of a prompt has more than blocks
	blocks  int64 // the window, in blocks
}

// Fold is the state of one engine, or one rank of it, as its batches tell it: a multiset of blocks by place. Its rules
// are those of docs/wire-formats.md (what the events mean), where a block counts as held before a store if its upper
// count is above 0 then: after the earlier events of the same batch, removals and clears included. The zero Fold is
// empty and ready. It is not safe for concurrent use.
//
// A Fold grows with the blocks that the engine claims to hold. It tells 1,024 pairs of group and medium apart; see
// Overflowed for what is beyond.
type Fold struct {
	copies     map[place]Copies // none with Upper 0
	ids        map[slot]uint32
	slots      []slot
	stored     []uint64 // by slot, the number of the latest batch that stored there
	removed    []uint64 // by slot, the number of the latest batch that removed there
	cleared    uint64   // the number of the latest batch that cleared
	batches    uint64
	groups     map[int64]group // those that stores have named by group_idx in this life
	unmatched  uint64
	overflowed uint64

	// Memory of one Apply.
	events  []folding
	roots   []int32         // the events that name a prompt's blocks from its start
	fresh   map[place]int64 // upper counts within the batch, where they are not those before it
	emptied bool            // the batch has cleared: what it has not stored since is not held
	medium  []byte
}

// folding is what Apply works out about an event before it counts any.
type folding struct {
	slot   uint32
	placed bool // there is a slot
	again  bool // an earlier event of the batch stores in the same slot
	gone   bool // an earlier event of the batch removes in the same slot, or clears
	held   bool // the engine may have held every block before the event; known for roots only
	report bool // the event may be a report of blocks that were stored before
}

// Clear forgets everything but the counters of UnmatchedRemoves and Overflowed: what comes next is another life of the
// engine, perhaps with other groups.
func (f *Fold) Clear() {
	clear(f.copies)
	clear(f.ids)
	clear(f.groups)
	f.slots, f.stored, f.removed = f.slots[:0], f.stored[:0], f.removed[:0]
}

// Len returns the number of places that hold a copy or may.
func (f *Fold) Len() int { return len(f.copies) }

// Copies returns what is at p.
func (f *Fold) Copies(p Place) Copies {
	id, ok := f.ids[slot{p.Group, p.Medium}]
	if !ok {
		return Copies{}
	}
	return f.copies[place{p.Hash, id}]
}

// UnmatchedRemoves returns how many removals were of a block that was not there. They change nothing: history may be
// missing, and one connector of vLLM names the wrong medium.
func (f *Fold) UnmatchedRemoves() uint64 { return f.unmatched }

// Overflowed returns how many events were ignored because they named a medium of more than 256 bytes, or a pair of
// group and medium beyond the first 1,024 of this life.
func (f *Fold) Overflowed() uint64 { return f.overflowed }

// All returns the places that hold a copy or may, in no order. The Fold must not change meanwhile.
func (f *Fold) All() iter.Seq2[Place, Copies] {
	return func(yield func(Place, Copies) bool) {
		for p, c := range f.copies {
			s := &f.slots[p.slot]
			if !yield(Place{p.hash, s.group, s.medium}, c) {
				return
			}
		}
	}
}

// Sorted returns what All does, by hash, group and medium, absent ones first.
func (f *Fold) Sorted() []Held {
	held := make([]Held, 0, f.Len())
	for p, c := range f.All() {
		held = append(held, Held{p, c})
	}
	slices.SortFunc(held, func(a, b Held) int {
		return cmp.Or(cmp.Compare(a.Hash, b.Hash), compareOpt(a.Group, b.Group), compareOpt(a.Medium, b.Medium))
	})
	return held
}

func compareOpt[T cmp.Ordered](a, b Opt[T]) int {
	switch {
	case a.OK && b.OK:
		return cmp.Compare(a.V, b.V)
	case a.OK:
		return 1
	case b.OK:
		return -1
	}
	return 0
}

// Apply counts a batch, in the order of its events.
func (f *Fold) Apply(b *Batch) {
	if f.copies == nil {
		f.copies, f.ids, f.groups = map[place]Copies{}, map[slot]uint32{}, map[int64]group{}
		f.fresh = map[place]int64{}
	}
	f.locate(b)
	f.findReports(b)
	for i := range b.Events {
		e, at := &b.Events[i], f.events[i]
		switch e.Type {
		case BlockStored:
			f.store(e, at)
		case BlockRemoved:
			f.remove(e, at)
		case AllBlocksCleared:
			clear(f.copies)
		}
	}
}

func (f *Fold) store(e *Event, at folding) {
	if !at.placed {
		f.overflowed++
		return
	}
	// A report shows that the engine holds the blocks, except where it names blocks that a window has left behind.
	reused := at.report && (len(f.groups) == 1 || f.groups[e.Group.V].full)
	for _, h := range e.Hashes {
		p := place{h, at.slot}
		c := f.copies[p]
		c.Upper++
		switch {
		case !at.report:
			c.Lower++
		case reused:
			c.Lower = max(c.Lower, 1)
		}
		f.copies[p] = c
	}
}

func (f *Fold) remove(e *Event, at folding) {
	for _, h := range e.Hashes {
		p := place{h, at.slot}
		c, held := f.copies[p]
		switch {
		case !at.placed || !held:
			f.unmatched++
		case c.Upper == 1:
			delete(f.copies, p)
		default:
			f.copies[p] = Copies{max(c.Lower-1, 0), c.Upper - 1}
		}
	}
}

// locate finds the slot of each event, and learns of new slots and of groups from stores. It does so before anything is
// counted, since an engine's first batch shows only as a whole how many groups there are.
func (f *Fold) locate(b *Batch) {
	f.events = f.events[:0]
	f.batches++
	for i := range b.Events {
		e := &b.Events[i]
		var at folding
		if e.Type == AllBlocksCleared {
			f.cleared = f.batches
		} else {
			at.slot, at.placed = f.slotOf(e)
		}
		if e.Type == BlockRemoved && at.placed {
			f.removed[at.slot] = f.batches
		}
		if e.Type == BlockStored && at.placed {
			at.again = f.stored[at.slot] == f.batches
			at.gone = f.removed[at.slot] == f.batches || f.cleared == f.batches
			f.stored[at.slot] = f.batches
			if e.Group.OK {
				g := f.groups[e.Group.V]
				g.learn(e)
				f.groups[e.Group.V] = g
			}
		}
		f.events = append(f.events, at)
	}
}

// slotOf returns the slot of e. A store may open a new one.
func (f *Fold) slotOf(e *Event) (id uint32, ok bool) {
	if len(e.Medium) > maxMedium {
		return 0, false
	}
	f.medium = append(f.medium[:0], e.Medium...)
	named := e.Medium != nil
	if string(e.Locality) == "REMOTE" {
		f.medium = append(f.medium, "@REMOTE"...)
		named = true
	}
	// This form of look-up does not copy the name.
	if id, ok = f.ids[slot{e.Group, Opt[string]{string(f.medium), named}}]; ok {
		return id, true
	}
	if e.Type != BlockStored || len(f.slots) == maxSlots {
		return 0, false
	}
	s := slot{e.Group, Opt[string]{string(f.medium), named}}
	id = uint32(len(f.slots))
	f.ids[s] = id
	f.slots, f.stored, f.removed = append(f.slots, s), append(f.stored, 0), append(f.removed, 0)
	return id, true
}

// learn takes over what a store says about its group. Stores of offloaded blocks say less than others: their block
// size is 0.
func (g *group) learn(e *Event) {
	switch string(e.SpecKind) {
	case "":
	case "full_attention", "mla_attention", "sink_full_attention":
		*g = group{full: true}
	case "mamba":
		*g = group{bounded: true, blocks: 1}
	case "sliding_window":
		g.full = false
		if w, size := e.SlidingWindow.V, e.BlockSize.V; w > 0 && size > 0 {
			// (w-1)/size, rounded up, without a sum that a peer's numbers could overflow.
			blocks := (w - 1) / size
			if (w-1)%size > 0 {
				blocks++
			}
			*g = group{bounded: true, blocks: blocks}
		}
	default:
		*g = group{}
	}
}

// findReports marks the stores that may be reports. vLLM from 0.26, asked for a full report, names the whole prefix
// that a request reuses, in every group and in the form of a true store. Nothing in the event tells the two apart. What
// can be told is that a report names, from its start, a prompt of which the engine holds every block.
func (f *Fold) findReports(b *Batch) {
	f.roots, f.emptied = f.roots[:0], false
	clear(f.fresh)
	counted := 0
	for i := range b.Events {
		e, at := &b.Events[i], &f.events[i]
		if e.Type != BlockStored || !e.Map || !e.Group.OK || e.Parent.OK || len(e.Hashes) == 0 || !at.placed {
			continue
		}
		at.held = f.holds(e, at)
		if at.held && at.gone || !at.held && at.again {
			// Requests of one step reuse each other's blocks, so those stored earlier in the batch may be reported too. And
			// a store behind a removal of the last copy, or a clear, is a true one.
			f.refresh(b, counted, i)
			counted = i
			at.held = f.holds(e, at)
		}
		// Offloading connectors store without tokens, and never report.
		at.report = len(f.groups) == 1 && at.held && len(e.Tokens) > 0
		f.roots = append(f.roots, int32(i))
	}
	if len(f.groups) == 1 {
		return
	}
	// With several groups the stores of one list come together, one per group at least. Sorting finds them in a time
	// that no batch can drive up.
	slices.SortFunc(f.roots, func(i, j int32) int {
		return cmp.Or(f.compareLists(b, i, j), cmp.Compare(b.Events[i].Group.V, b.Events[j].Group.V))
	})
	for rest := f.roots; len(rest) > 0; {
		n := 1
		for n < len(rest) && f.compareLists(b, rest[0], rest[n]) == 0 {
			n++
		}
		f.markReports(b, rest[:n])
		rest = rest[n:]
	}
}

// compareLists orders stores by their medium and blocks.
func (f *Fold) compareLists(b *Batch, i, j int32) int {
	return cmp.Or(compareOpt(f.slots[f.events[i].slot].medium, f.slots[f.events[j].slot].medium),
		slices.Compare(b.Events[i].Hashes, b.Events[j].Hashes))
}

// refresh brings f.fresh, and f.emptied, from event from to before event to. Whether a store is a report makes no
// difference to the upper count.
func (f *Fold) refresh(b *Batch, from, to int) {
	for i := from; i < to; i++ {
		e, at := &b.Events[i], &f.events[i]
		if e.Type == AllBlocksCleared {
			f.emptied = true
			clear(f.fresh)
		}
		if !at.placed {
			continue
		}
		for _, h := range e.Hashes {
			p := place{h, at.slot}
			switch n := f.upper(p); {
			case e.Type == BlockStored:
				f.fresh[p] = n + 1
			case n > 0:
				f.fresh[p] = n - 1
			}
		}
	}
}

// upper returns the upper count of p within the batch, as far as refresh has come.
func (f *Fold) upper(p place) int64 {
	if n, ok := f.fresh[p]; ok {
		return n
	}
	if f.emptied {
		return 0
	}
	return f.copies[p].Upper
}

// holds reports whether every block of e may have been held in its group and medium before it came.
func (f *Fold) holds(e *Event, at *folding) bool {
	for _, h := range e.Hashes {
		if f.upper(place{h, at.slot}) == 0 {
			return false
		}
	}
	return true
}

// markReports marks those stores of one list, sorted by group, that may be reports by an engine of several groups: each
// group has stored the list in this batch, full attention holds every block of it, and so do the others, unless the
// list is too long to be a true store of theirs. A group holds the list if it did so at any of its stores of it, but
// the group of a store itself is judged at that store: of two stores in one batch the first may be true.
func (f *Fold) markReports(b *Batch, stores []int32) {
	groups := 0
	everywhere, long := true, true
	for rest := stores; len(rest) > 0; groups++ {
		e := &b.Events[rest[0]]
		held := false
		for len(rest) > 0 && b.Events[rest[0]].Group == e.Group {
			held = held || f.events[rest[0]].held
			rest = rest[1:]
		}
		g := f.groups[e.Group.V]
		if g.full && !held {
			return
		}
		everywhere = everywhere && held
		long = long && (g.full || g.bounded && int64(len(e.Hashes)) > g.blocks)
	}
	if groups < len(f.groups) {
		return
	}
	for _, i := range stores {
		e, at := &b.Events[i], &f.events[i]
		may := at.held && everywhere || long && (at.held || !f.groups[e.Group.V].full)
		at.report = may && len(e.Tokens) > 0
	}
}
