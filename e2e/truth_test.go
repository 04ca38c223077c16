// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/kvtap/kvtap/event"
)

// truth is what one rank of an engine holds after each of its batches, as truth_scheduler.py writes it. Safe for
// concurrent use.
type truth struct {
	path string

	mu    sync.Mutex
	read  int64    // bytes of the file that are in lines
	lines [][]byte // by number of the batch
}

// count returns how many batches the engine has published, or is about to.
func (tr *truth) count() (int, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	file, err := os.Open(tr.path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }() // only read
	if _, err := file.Seek(tr.read, io.SeekStart); err != nil {
		return 0, err
	}
	news, err := io.ReadAll(file)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(news) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // being written, or never finished by an engine that was killed
		}
		tr.lines = append(tr.lines, line)
		tr.read += int64(len(line))
	}
	return len(tr.lines), nil
}

// held returns the copies that the engine held after batch seq, by place.
func (tr *truth) held(seq uint64) (map[string]int64, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if seq >= uint64(len(tr.lines)) {
		return nil, fmt.Errorf("batch %d was delivered, but the engine noted %d", seq, len(tr.lines))
	}
	var line struct {
		Seq  uint64
		Held map[string]int64
	}
	if err := json.Unmarshal(tr.lines[seq], &line); err != nil {
		return nil, err
	}
	if line.Seq != seq {
		return nil, fmt.Errorf("%s has batch %d in line %d", tr.path, line.Seq, seq)
	}
	return line.Held, nil
}

// comparison is what came of comparing folds with the truth.
type comparison struct {
	batches     int
	blocks      int   // places held, by either, summed over the batches
	uncertain   int   // of these, those that the fold holds to a lower and a higher bound
	copies      int64 // the most that the engine held of one block
	differences int
	shown       []string // the first of them, each place once
	places      map[string]bool
}

// add compares the fold after batch seq with what the engine held then. With exact set the fold may not be uncertain.
func (c *comparison) add(seq uint64, fold []event.Held, held map[string]int64, exact bool) {
	c.batches++
	differ := func(place, format string, args ...any) {
		if c.differences++; len(c.shown) < 10 && !c.places[place] {
			if c.places == nil {
				c.places = map[string]bool{}
			}
			c.places[place] = true
			c.shown = append(c.shown, fmt.Sprintf("from batch %d on, %s: ", seq, place)+fmt.Sprintf(format, args...))
		}
	}
	seen := 0
	for _, h := range fold {
		place := fmt.Sprintf("%s:%d", h.Hash, h.Group.V)
		is, ok := held[place]
		c.blocks++
		c.copies = max(c.copies, is)
		if ok {
			seen++
		}
		if h.Lower != h.Upper {
			c.uncertain++
		}
		switch {
		case !h.Group.OK || h.Medium.V != "GPU":
			differ(place, "it is in group %+v and medium %+v", h.Group, h.Medium)
		case is < h.Lower || is > h.Upper:
			differ(place, "the engine holds %d, the fold %d to %d", is, h.Lower, h.Upper)
		case exact && h.Lower != h.Upper:
			differ(place, "the engine holds %d, the fold is uncertain: %d to %d", is, h.Lower, h.Upper)
		}
	}
	if seen == len(held) {
		return
	}
	known := map[string]bool{}
	for _, h := range fold {
		known[fmt.Sprintf("%s:%d", h.Hash, h.Group.V)] = true
	}
	missing := []string{}
	for place := range held {
		if !known[place] {
			missing = append(missing, place)
		}
	}
	slices.Sort(missing)
	for _, place := range missing {
		c.blocks++
		differ(place, "the engine holds %d, the fold none", held[place])
	}
}
