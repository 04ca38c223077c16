// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kvtap/kvtap/event"
)

// Table writes batches as lines of aligned columns, one line per event. Whatever an engine sent is made safe to print.
type Table struct {
	// Colour marks kinds of lines by ANSI colours.
	Colour bool
	// Dated puts the whole date, in UTC, on each line. Otherwise lines carry the local time of day, and a line of its
	// own says when the day changes.
	Dated bool
	// Source adds the column FROM, live or replay.
	Source bool
	// Zone is where days begin if not Dated. Nil means time.Local.
	Zone *time.Location

	day string
}

// Row says what a batch's lines have in common.
type Row struct {
	// At stands in where the batch has no time of its own.
	At       time.Time
	Seq      uint64
	HasSeq   bool
	Replayed bool
}

const (
	clockLayout = "15:04:05.000"
	dateLayout  = "2006-01-02T15:04:05.000Z"
)

const (
	bold    = "\x1b[1m"
	dim     = "\x1b[2m"
	red     = "\x1b[31m"
	green   = "\x1b[32m"
	yellow  = "\x1b[33m"
	magenta = "\x1b[35m"
	cyan    = "\x1b[36m"
	plain   = "\x1b[0m"
)

// AppendHeader appends the line that names the columns.
func (t *Table) AppendHeader(dst []byte) []byte {
	from := ""
	if t.Source {
		from = "FROM    "
	}
	line := fmt.Sprintf("%-*s  %8s  %sEVENT    %6s  %-16s  %-16s  %6s  %-10s  %s",
		t.timeWidth(), "TIME", "SEQ", from, "BLOCKS", "FIRST HASH", "PARENT", "TOKENS", "MEDIUM", "LORA AND MORE")
	return t.appendLine(dst, bold, line)
}

// AppendBatch appends one line per event and per skipped event, and one for a batch without any.
func (t *Table) AppendBatch(dst []byte, b *event.Batch, row Row) []byte {
	at := row.At
	// Beyond these seconds time.Time wraps; no engine's clock is there.
	if s := b.Time.V; b.Time.OK && s > -1e11 && s < 1e11 {
		at = time.UnixMicro(int64(s * 1e6))
	}
	dst = t.appendDay(dst, at)
	prefix := t.prefix(at, row)
	for i := range b.Events {
		e := &b.Events[i]
		dst = t.appendLine(dst, t.eventColour(e.Type, row.Replayed), prefix+describe(e))
	}
	for i := range b.Skipped {
		dst = t.appendLine(dst, red, prefix+"skipped  "+skipReason(&b.Skipped[i]))
	}
	if len(b.Events)+len(b.Skipped) == 0 {
		dst = t.appendLine(dst, dim, prefix+"nothing")
	}
	return dst
}

// AppendNote appends a line about the stream itself, such as a change of state.
func (t *Table) AppendNote(dst []byte, at time.Time, note string) []byte {
	dst = t.appendDay(dst, at)
	return t.appendLine(dst, cyan, t.clock(at)+"  -- "+note)
}

func (t *Table) prefix(at time.Time, row Row) string {
	seq, from := "-", ""
	if row.HasSeq {
		seq = strconv.FormatUint(row.Seq, 10)
	}
	if t.Source {
		from = "live    "
		if row.Replayed {
			from = "replay  "
		}
	}
	return fmt.Sprintf("%s  %8s  %s", t.clock(at), seq, from)
}

func (t *Table) eventColour(kind event.Type, replayed bool) string {
	switch {
	case replayed:
		return dim
	case kind == event.BlockStored:
		return green
	case kind == event.BlockRemoved:
		return yellow
	}
	return magenta
}

// describe returns the columns of an event from its kind on.
func describe(e *event.Event) string {
	if e.Type == event.AllBlocksCleared {
		return "cleared       all"
	}
	kind, parent, tokens := "stored", "-", "-"
	var more []string
	if e.Type == event.BlockRemoved {
		kind = "removed"
	} else {
		if e.Parent.OK {
			parent = e.Parent.V.String()
		}
		if e.Tokens != nil {
			tokens = strconv.Itoa(len(e.Tokens) / max(e.Stride, 1))
		}
		switch {
		case e.LoRAName != nil:
			more = append(more, "lora "+Clean(e.LoRAName))
		case e.LoRAID.OK:
			more = append(more, "lora "+strconv.FormatInt(e.LoRAID.V, 10))
		}
	}
	if e.Group.OK {
		more = append(more, "group "+strconv.FormatInt(e.Group.V, 10))
	}
	// Full attention is what everybody expects; naming it on each line would hide the other kinds.
	if e.SpecKind != nil && string(e.SpecKind) != "full_attention" {
		more = append(more, Clean(e.SpecKind))
	}
	if e.Locality != nil {
		more = append(more, Clean(e.Locality))
	}
	if e.CacheSalt != nil {
		more = append(more, "salt "+Clean(e.CacheSalt))
	}
	if n := keyed(e.ExtraKeys); n > 0 {
		more = append(more, "extra keys on "+count(n, "block"))
	}
	if e.Tokens != nil && !e.TokensUsable() {
		more = append(more, "tokens unusable")
	}
	first, medium := "-", "-"
	if len(e.Hashes) > 0 {
		first = e.Hashes[0].String()
	}
	if e.Medium != nil {
		medium = Clean(e.Medium)
	}
	return fmt.Sprintf("%-7s  %6d  %-16s  %-16s  %6s  %-10s  %s",
		kind, len(e.Hashes), first, parent, tokens, medium, strings.Join(more, ", "))
}

// unknownType is the Reason of an event whose type is none that package event knows.
const unknownType = "unknown event type"

// skipReason says why an event was skipped, and of what type it was where that could be read.
func skipReason(s *event.Skip) string {
	switch {
	case s.Tag == nil:
		return s.Reason
	case s.Reason != unknownType:
		return Clean(s.Tag) + ": " + s.Reason
	case len(s.Tag) == 0:
		return unknownType + ` ""`
	}
	return unknownType + " " + Clean(s.Tag)
}

func keyed(blocks []event.BlockKeys) (n int) {
	for _, keys := range blocks {
		if len(keys) > 0 {
			n++
		}
	}
	return n
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

func (t *Table) timeWidth() int {
	if t.Dated {
		return len(dateLayout)
	}
	return len(clockLayout)
}

func (t *Table) clock(at time.Time) string {
	switch {
	case at.IsZero():
		return fmt.Sprintf("%-*s", t.timeWidth(), "-")
	case t.Dated:
		return at.UTC().Format(dateLayout)
	}
	return at.In(t.zone()).Format(clockLayout)
}

func (t *Table) zone() *time.Location {
	if t.Zone == nil {
		return time.Local
	}
	return t.Zone
}

// appendDay appends the date where it is another than on the line before.
func (t *Table) appendDay(dst []byte, at time.Time) []byte {
	if t.Dated || at.IsZero() {
		return dst
	}
	day := at.In(t.zone()).Format("2006-01-02 MST")
	if day == t.day {
		return dst
	}
	t.day = day
	return t.appendLine(dst, bold, day)
}

func (t *Table) appendLine(dst []byte, colour, line string) []byte {
	line = strings.TrimRight(line, " ")
	if !t.Colour {
		return append(append(dst, line...), '\n')
	}
	dst = append(append(dst, colour...), line...)
	return append(append(dst, plain...), '\n')
}

// maxClean bounds, in characters, what a peer's text may take of a line.
const maxClean = 64

// Clean returns text of a peer's making so that it cannot drive a terminal or fill it.
func Clean[T string | []byte](text T) string {
	var b strings.Builder
	s := string(text[:min(len(text), maxClean*utf8.UTFMax)])
	n := 0
	for _, r := range s {
		if n == maxClean {
			break
		}
		if !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		b.WriteRune(r)
		n++
	}
	if b.Len() < len(text) && n == maxClean {
		b.WriteString("...")
	}
	return b.String()
}
