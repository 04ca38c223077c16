// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/recording"
	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
	"github.com/kvtap/kvtap/event"
)

func (a *app) decodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "decode [FILE]",
		Short: "Show what is in payloads or a recording",
		Long: `Decode payloads, in any form that engines send, to one JSON object per line (or a table with -o text).

FILE holds one payload per line: in hex, as "SEQ HEX", or as written by "kvtap record"; it may be gzipped. Without FILE,
or with "-", standard input is read.

Block hashes are 16 hex digits. token_ids is null where the engine sent none or where they do not fit the blocks. Events
that could not be understood are listed under "skipped", with their place in the batch, counted from 0, and the reason:

  {"index":1,"reason":"BlockRemoved: block_hashes: not a list of hashes"}

A line that cannot be read is reported on stderr with its number, the rest goes on, and the exit status is 1.`,
		Example: `  kvtap decode run.jsonl.gz
  kvtap decode -o text run.jsonl.gz
  echo 92cb41da3054981000009191b0416c6c426c6f636b73436c6561726564 | kvtap decode`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("unexpected argument %q: give one file, or pipe several in", args[1])
			}
			if len(args) == 1 {
				return exactly("FILE")(nil, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := "-"
			if len(args) == 1 {
				name = args[0]
			}
			in, err := a.open(cmd.Context(), name)
			if err != nil {
				return err
			}
			defer in.close()
			return a.decode(in)
		},
	}
}

func (a *app) decode(in *input) error {
	out := newBurstWriter(a.stdout, nil)
	table := &render.Table{Dated: true, Colour: colourful(a.stdout)}
	asJSON := a.wantsJSON(true)
	var (
		batch  event.Batch
		buf    []byte
		failed bool
		headed = asJSON
	)
	unreadable := func(line *recording.LineError) {
		failed = true
		a.complain("%s: %v", in.name, line)
	}
	err := in.each(unreadable, func(rec *recording.Record) error {
		if err := batch.Decode(rec.Payload); err != nil {
			unreadable(&recording.LineError{Line: in.Line(), Err: err})
			return nil
		}
		buf = buf[:0]
		if !headed {
			headed = true
			buf = table.AppendHeader(buf)
		}
		if asJSON {
			buf = append(render.AppendBatch(buf, &batch), '\n')
		} else {
			buf = table.AppendBatch(buf, &batch, render.Row{At: rec.ReceivedAt, Seq: rec.Seq, HasSeq: rec.HasSeq})
		}
		_, err := out.Write(buf)
		return err
	})
	if flushErr := out.Flush(); err == nil {
		err = flushErr
	}
	if err == nil && failed {
		return errReported
	}
	return err
}
