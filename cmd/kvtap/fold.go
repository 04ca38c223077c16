// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/recording"
	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
	"github.com/kvtap/kvtap/event"
)

func (a *app) foldCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "fold FILE",
		Short: "Show what an engine held at the end of a recording",
		Long: `Fold a recording into the engine's final state: one JSON object per block, group and medium (or a table
with -o text), sorted by these, null first.

  {"hash":"deadbeef12345678","group":0,"medium":"GPU","copies":1}

Group and medium are null where the engine does not send them. Engines may hold several copies of one block. Where they
report blocks again that they stored before, copies is the most there can be and certain_copies the least; otherwise
certain_copies is left out.

A sequence number that goes back begins another life of the engine, and what was held before is gone. Missing numbers
are reported on stderr; they alone leave the exit status at 0. If something cannot be read that may have removed blocks,
the fold begins anew behind it: then nothing shown is gone, more may be held, and the exit status is 1.

FILE is a recording of "kvtap record" or has lines "SEQ HEX"; it may be gzipped. "-" is standard input.`,
		Example: `  kvtap fold run.jsonl.gz
  kvtap fold -o text run.jsonl.gz`,
		Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := a.open(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer in.close()
			return a.fold(cmd.Context(), in)
		},
	}
}

func (a *app) fold(ctx context.Context, in *input) error {
	f := folder{tell: func(line int, format string, args ...any) {
		a.complain("%s: line %d: %s", in.name, line, fmt.Sprintf(format, args...))
	}}
	err := in.each(func(line *recording.LineError) {
		f.unreadable(line.Line, line.Err)
	}, func(rec *recording.Record) error {
		f.add(in.Line(), rec)
		return nil
	})
	// What came before the damage of a file is still an answer.
	damaged := err
	if ctx.Err() != nil {
		return err
	}
	if f.batches == 0 && damaged == nil && !f.failed {
		a.complain("%s: there is no batch in it", in.name)
	}
	out := newBurstWriter(a.stdout, nil)
	if err := a.writeFold(out, &f); err != nil {
		return err
	}
	switch {
	case damaged != nil:
		return damaged
	case f.failed:
		return errReported
	}
	return nil
}

func (a *app) writeFold(out *burstWriter, f *folder) error {
	var buf []byte
	asJSON := a.wantsJSON(true)
	if !asJSON {
		buf = fmt.Appendf(buf, "%-16s  %5s  %-10s  %6s  %7s\n", "HASH", "GROUP", "MEDIUM", "COPIES", "CERTAIN")
	}
	held := f.state.Sorted()
	for _, h := range held {
		if asJSON {
			buf = append(render.AppendHeld(buf, h), '\n')
		} else {
			group, medium := "-", "-"
			if h.Group.OK {
				group = strconv.FormatInt(h.Group.V, 10)
			}
			if h.Medium.OK {
				medium = render.Clean(h.Medium.V)
			}
			buf = fmt.Appendf(buf, "%-16s  %5s  %-10s  %6d  %7d\n", h.Hash, group, medium, h.Upper, h.Lower)
		}
		if _, err := out.Write(buf); err != nil {
			return err
		}
		buf = buf[:0]
	}
	if !asJSON {
		if _, err := out.Write(f.summary(buf, held)); err != nil {
			return err
		}
	}
	return out.Flush()
}

// folder folds the messages of one engine and notes what its state is worth.
type folder struct {
	state event.Fold
	batch event.Batch
	// tell is told what casts doubt on the state.
	tell func(line int, format string, args ...any)

	batches uint64
	lives   int
	last    uint64 // number of the last message of this life
	digest  uint64 // of its payload
	begun   bool   // this life has a message
	missing uint64 // numbers of this life that are missing
	first   uint64 // number of this life's first message
	failed  bool   // something could not be read
	partial bool   // the state was begun anew behind something unreadable
}

var digestSeed = maphash.MakeSeed()

func (f *folder) add(line int, rec *recording.Record) {
	if !rec.HasSeq {
		f.unreadable(line, errNoSeq)
		return
	}
	digest := maphash.Bytes(digestSeed, rec.Payload)
	switch {
	case !f.begun:
		f.begin(line, rec.Seq)
	case rec.Seq == f.last && digest == f.digest:
		return // the same message again, as overlapping recordings have it
	case rec.Seq <= f.last:
		f.state.Clear()
		f.missing, f.partial = 0, false
		f.begin(line, rec.Seq)
	case rec.Seq != f.last+1:
		f.missing += rec.Seq - f.last - 1
		f.tell(line, "%s missing before it; removals among them are not known", span(f.last+1, rec.Seq-1))
	}
	f.last, f.digest, f.begun = rec.Seq, digest, true
	f.batches++
	if err := f.batch.Decode(rec.Payload); err != nil {
		f.unreadable(line, err)
		return
	}
	f.apply(line)
}

// apply folds the batch in hand. Events behind one that may have removed anything still tell what is there.
func (f *folder) apply(line int) {
	b := &f.batch
	for i := range b.Skipped {
		s := &b.Skipped[i]
		switch {
		case s.MayRemove(), string(s.Tag) == tagStored:
			f.failed = true
		default:
			f.tell(line, "event %d is of unknown type %q and was passed over", s.Index, render.Clean(s.Tag))
			continue
		}
		f.tell(line, "event %d (%s) cannot be read: %s", s.Index, cmp.Or(render.Clean(s.Tag), "type unknown"), s.Reason)
	}
	if cut, doubt := b.Doubt(); doubt {
		f.restart(line)
		b.Events = b.Events[cut:]
	}
	f.state.Apply(b)
	for i := range b.Events {
		if b.Events[i].Type == event.AllBlocksCleared && len(b.Skipped) == 0 {
			// An empty cache has no history that could be missing.
			f.missing, f.partial, f.first = 0, false, 0
		}
	}
}

var (
	errNoSeq  = errors.New("it has no sequence number, which a fold needs; write `SEQ HEX`")
	tagStored = event.BlockStored.String()
)

// begin begins a life.
func (f *folder) begin(line int, seq uint64) {
	f.lives++
	f.first = seq
	// Engines count from 0, a few from 1.
	if seq > 1 {
		f.tell(line, "the engine's events begin with sequence %d; what it stored before is not known", seq)
	}
}

// unreadable takes note of a message that could not be read. It may have removed anything.
func (f *folder) unreadable(line int, err error) {
	f.failed = true
	f.tell(line, "%v", err)
	f.restart(line)
}

// restart forgets what may be gone.
func (f *folder) restart(line int) {
	f.partial = true
	if f.state.Len() > 0 {
		f.tell(line, "it may have removed any block, so the fold begins anew behind it")
	}
	f.state.Clear()
}

// summary appends what a table of the state should say of its worth.
func (f *folder) summary(dst []byte, held []event.Held) []byte {
	var copies, certain int64
	for _, h := range held {
		copies += h.Upper
		certain += h.Lower
	}
	dst = fmt.Appendf(dst, "\n%d held, %s", len(held), plural(copies, "copy", "copies"))
	if certain != copies {
		dst = fmt.Appendf(dst, " (%d certain)", certain)
	}
	dst = fmt.Appendf(dst, ", after %s", plural(f.batches, "batch", "batches"))
	if f.begun {
		dst = fmt.Appendf(dst, " up to sequence %d", f.last)
	}
	if f.lives > 1 {
		dst = fmt.Appendf(dst, " in %d lives of the engine", f.lives)
	}
	dst = append(dst, '\n')
	if f.missing > 0 {
		dst = fmt.Appendf(dst, "Gaps: %s missing, so some of these blocks may be gone.\n",
			plural(f.missing, "sequence number is", "sequence numbers are"))
	}
	if f.partial || f.first > 1 {
		dst = append(dst, "Partial: older history is missing, so more blocks may be held.\n"...)
	}
	if n := f.state.UnmatchedRemoves(); n > 0 {
		dst = fmt.Appendf(dst, "Unmatched: %s of blocks that were not held.\n",
			plural(n, "removal was", "removals were"))
	}
	if n := f.state.Overflowed(); n > 0 {
		dst = fmt.Appendf(dst, "Ignored: %s too many groups and media, or one too long.\n",
			plural(n, "event names", "events name"))
	}
	return dst
}

// plural returns a number with the word that fits it.
func plural[T int64 | uint64](n T, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func span(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("sequence %d is", from)
	}
	return fmt.Sprintf("sequences %d to %d are", from, to)
}
