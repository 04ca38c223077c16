// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kvtap/kvtap/enginesim"
)

// tally is what the runs of a test add up to.
type tally struct {
	schedules, quiet, exact, atLeast, unknown, mustExact int
	batches, replays, resets, connections                uint64
	compared, skipped                                    int // claims, with the truth of their number, or for want of it
	faults                                               [enginesim.FaultClear + 1]int
}

func (t *tally) add(o *tally) {
	t.schedules += o.schedules
	t.quiet += o.quiet
	t.exact += o.exact
	t.atLeast += o.atLeast
	t.unknown += o.unknown
	t.mustExact += o.mustExact
	t.batches += o.batches
	t.replays += o.replays
	t.resets += o.resets
	t.connections += o.connections
	t.compared += o.compared
	t.skipped += o.skipped
	for k, n := range o.faults {
		t.faults[k] += n
	}
}

// table tells it in columns.
func (t *tally) table(took time.Duration) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(what string, n any, more string, args ...any) {
		_, _ = fmt.Fprintf(w, "%s\t%v\t%s\n", what, n, fmt.Sprintf(more, args...))
	}
	row("", "", "")
	row("schedules", t.schedules, "in %v", took.Round(time.Millisecond))
	row("quiet points", t.quiet, "exact %d (%d had to be), at_least %d, unknown %d", t.exact, t.mustExact, t.atLeast,
		t.unknown)
	row("claims compared", t.compared, "not comparable: %d", t.skipped)
	row("batches", t.batches, "")
	row("replays", t.replays, "")
	row("resets", t.resets, "")
	row("connections", t.connections, "")
	faults := 0
	for _, n := range t.faults {
		faults += n
	}
	row("faults", faults, "")
	for _, k := range enginesim.FaultKinds() {
		row("  "+k.String(), t.faults[k], "")
	}
	_ = w.Flush() // a strings.Builder takes everything
	return b.String()
}
