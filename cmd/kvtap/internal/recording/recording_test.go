// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package recording

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// readAll returns what a reader has: records, and errors as text.
func readAll(t *testing.T, r *Reader) (records []Record, problems []string) {
	t.Helper()
	for {
		rec, err := r.Next()
		line := (*LineError)(nil)
		switch {
		case err == nil:
			copied := *rec
			copied.Payload = bytes.Clone(rec.Payload)
			records = append(records, copied)
		case errors.As(err, &line):
			if line.Line != r.Line() {
				t.Errorf("error of line %d at line %d", line.Line, r.Line())
			}
			problems = append(problems, err.Error())
		case errors.Is(err, io.EOF):
			return records, problems
		default:
			return records, append(problems, "ended: "+err.Error())
		}
	}
}

var sample = []Record{
	{ReceivedAt: time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC), Topic: "kv@pod@m", Seq: 0, HasSeq: true,
		Payload: []byte{0}},
	{ReceivedAt: time.Date(2026, 3, 1, 12, 0, 1, 0, time.UTC), Seq: 1<<64 - 2, HasSeq: true,
		Payload: bytes.Repeat([]byte{0xfe}, 100_000)},
	{Topic: "\"\\\n\x01é", Payload: []byte{}},
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"run.jsonl", "run.jsonl.gz"} {
		var buf bytes.Buffer
		w := NewWriter(&buf, Gzipped(name))
		for i := range sample {
			if err := w.Write(&sample[i]); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			// What was flushed can be read before the end.
			unfinished, err := NewReader(bytes.NewReader(buf.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := readAll(t, unfinished); len(got) != i+1 {
				t.Fatalf("%s: %d of %d records after Flush", name, len(got), i+1)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if zipped := bytes.HasPrefix(buf.Bytes(), gzipMagic); zipped != strings.HasSuffix(name, ".gz") {
			t.Errorf("%s: gzipped: %v", name, zipped)
		}
		r, err := NewReader(iotest.OneByteReader(&buf))
		if err != nil {
			t.Fatal(err)
		}
		got, problems := readAll(t, r)
		if diff := cmp.Diff(sample, got); diff != "" || problems != nil {
			t.Errorf("%s: %q (-want +got):\n%s", name, problems, diff)
		}
	}
}

func TestLinesLookAsDocumented(t *testing.T) {
	t.Parallel()
	var buf bytes.Buffer
	w := NewWriter(&buf, false)
	east := time.Date(2026, 3, 1, 13, 0, 0, 0, time.FixedZone("CET", 3600))
	for _, rec := range []Record{{ReceivedAt: east, Topic: "t", Seq: 7, HasSeq: true, Payload: []byte{0xc1}}, {}} {
		if err := w.Write(&rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	const want = `{"received_at":"2026-03-01T12:00:00.000000Z","topic":"t","seq":7,"payload":"wQ=="}` + "\n" +
		`{"received_at":null,"topic":"","seq":null,"payload":""}` + "\n"
	if got := buf.String(); got != want {
		t.Errorf("got %s", got)
	}
}

func TestEveryFormOfALineIsRead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		line string
		want Record
	}{
		{"c1C2", Record{Payload: []byte{0xc1, 0xc2}}},
		{"7 c1", Record{Seq: 7, HasSeq: true, Payload: []byte{0xc1}}},
		{" 7 \t c1 \r", Record{Seq: 7, HasSeq: true, Payload: []byte{0xc1}}},
		{"18446744073709551615 c1", Record{Seq: 1<<64 - 1, HasSeq: true, Payload: []byte{0xc1}}},
		{"\ufeffc1", Record{Payload: []byte{0xc1}}},
		{`{"payload":"wQ==","later":[1,{}]}`, Record{Payload: []byte{0xc1}}},
		{`{"seq":0,"topic":"t","payload":""}`, Record{HasSeq: true, Topic: "t", Payload: []byte{}}},
		{`{"received_at":"2026-03-01T12:00:00+01:00","payload":"wQ=="}`,
			Record{ReceivedAt: time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC), Payload: []byte{0xc1}}},
	} {
		r, err := NewReader(strings.NewReader(c.line))
		if err != nil {
			t.Fatal(err)
		}
		got, problems := readAll(t, r)
		if diff := cmp.Diff([]Record{c.want}, got); diff != "" || problems != nil {
			t.Errorf("%q: %q (-want +got):\n%s", c.line, problems, diff)
		}
	}
}

func TestABadLineCostsNoOther(t *testing.T) {
	t.Parallel()
	lines := []struct{ line, problem string }{
		{"", ErrEmptyLine.Error()},
		{" \t ", ErrEmptyLine.Error()},
		{"zz", errNotHex.Error()},
		{"c", errNotHex.Error()},
		{"x c1", errNotASeq.Error()},
		{"-1 c1", errNotASeq.Error()},
		{"18446744073709551616 c1", errNotASeq.Error()},
		{strings.Repeat("9", 100) + " c1", errNotASeq.Error()},
		{"1 2 c1", ErrManyFields.Error()},
		{`{"seq":1`, errNotARecord.Error()},
		{`{"seq":-1,"payload":""}`, errNotARecord.Error()},
		{`{"seq":-4,"payload":""}`, `"seq" is not a sequence number, from 0 to 18446744073709551615: number -4`},
		{`{"seq":` + strings.Repeat("9", 100) + `,"payload":""}`, `"seq" is not a sequence number`},
		{`{"seq":1.5,"payload":""}`, errNotARecord.Error()},
		{`{"seq":1,"payload":[]}`, `"payload" is not a string: array`},
		{`{"seq":1}`, ErrNoPayload.Error()},
		{`{"payload":null}`, ErrNoPayload.Error()},
		{`{"payload":"c1c1c"}`, errNotBase64.Error()},
		{`{"received_at":"noon","payload":""}`, errNotATime.Error()},
		{strings.Repeat("c1", 200), ErrLongLine.Error()},
	}
	var in strings.Builder
	for _, l := range lines {
		in.WriteString(l.line + "\nc1\n")
	}
	// A long line must not be able to hide between buffers.
	r, err := newReader(iotest.OneByteReader(strings.NewReader(in.String())), 300)
	if err != nil {
		t.Fatal(err)
	}
	records, problems := readAll(t, r)
	if len(records) != len(lines) || len(problems) != len(lines) {
		t.Fatalf("%d records, problems %q", len(records), problems)
	}
	for i, l := range lines {
		if !strings.Contains(problems[i], l.problem) || !strings.HasPrefix(problems[i], "line ") ||
			strings.Contains(problems[i], "Go ") || len(problems[i]) > 300 {
			t.Errorf("%.40q: %s", l.line, problems[i])
		}
	}
}

// endless is a line that never ends.
type endless struct{ given int }

func (e *endless) Read(p []byte) (int, error) {
	if e.given > 1<<24 {
		return 0, io.EOF
	}
	for i := range p {
		p[i] = 'c'
	}
	e.given += len(p)
	return len(p), nil
}

func TestALineWithoutEndCostsBoundedMemory(t *testing.T) {
	t.Parallel()
	r, err := newReader(&endless{}, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); !errors.Is(err, ErrLongLine) {
		t.Errorf("%v", err)
	}
	if cap(r.buf) > 1<<18 {
		t.Errorf("%d bytes for a line that may have %d", cap(r.buf), 1<<16)
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("after it: %v", err)
	}
}

func TestAFileThatEndsEarlyIsReadUpToThere(t *testing.T) {
	t.Parallel()
	var buf bytes.Buffer
	zipped := gzip.NewWriter(&buf)
	if _, err := zipped.Write([]byte("c1\nc2\nc3c3")); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Flush(); err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(&buf)
	if err != nil {
		t.Fatal(err)
	}
	records, problems := readAll(t, r)
	if len(records) != 2 || len(problems) != 1 || !strings.HasPrefix(problems[0],
		"ended: after line 2: the gzip data ends early") {
		t.Errorf("%d records, problems %q", len(records), problems)
	}

	disk := errors.New("disk on fire")
	if r, err = NewReader(io.MultiReader(strings.NewReader("c1\nc2"), iotest.ErrReader(disk))); err != nil {
		t.Fatal(err)
	}
	records, problems = readAll(t, r)
	if len(records) != 1 || len(problems) != 1 || problems[0] != "ended: after line 1: disk on fire" {
		t.Errorf("%d records, problems %q", len(records), problems)
	}
	if _, err := NewReader(strings.NewReader("\x1f\x8bno")); err == nil {
		t.Error("what only looks gzipped is accepted")
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestErrorsOfWritingAreReported(t *testing.T) {
	t.Parallel()
	for _, gzipped := range []bool{false, true} {
		w := NewWriter(fullDisk{}, gzipped)
		if err := w.Write(&Record{}); err != nil {
			t.Errorf("a small record goes to the buffer first: %v", err)
		}
		if err := w.Flush(); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("Flush: %v", err)
		}
		if err := w.Write(&Record{Payload: make([]byte, 1<<20)}); !errors.Is(err, io.ErrShortWrite) {
			// A gzip writer keeps its error to itself until it is flushed or closed.
			if !gzipped {
				t.Errorf("Write: %v", err)
			}
		}
		if err := w.Close(); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("Close: %v", err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("7 c1\n"))
	f.Add([]byte("c1\r\n\n{\"seq\":1,\"payload\":\"wQ==\"}"))
	f.Add([]byte("{\"received_at\":\"2026-03-01T12:00:00Z\",\"topic\":\"t\",\"seq\":1,\"payload\":\"wQ==\"}\n"))
	f.Add([]byte("\x1f\x8b\x08\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := newReader(bytes.NewReader(in), 1<<10)
		if err != nil {
			return
		}
		records, problems := readAll(t, r)
		if !bytes.HasPrefix(in, gzipMagic) {
			// Each line is a record or a problem.
			lines := bytes.Count(in, []byte("\n"))
			if len(in) > 0 && !bytes.HasSuffix(in, []byte("\n")) {
				lines++
			}
			if len(records)+len(problems) != lines {
				t.Errorf("%d lines, %d records, problems %q", lines, len(records), problems)
			}
		}
		// What was read can be written and is read as the same, but for what is below a microsecond or not UTF-8.
		var buf bytes.Buffer
		w := NewWriter(&buf, false)
		for i := range records {
			if err := w.Write(&records[i]); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if r, err = NewReader(&buf); err != nil {
			t.Fatal(err)
		}
		again, problems := readAll(t, r)
		if len(again) != len(records) || problems != nil {
			t.Fatalf("%d records of %d, problems %q", len(again), len(records), problems)
		}
		for i, rec := range again {
			want := records[i]
			if rec.Seq != want.Seq || rec.HasSeq != want.HasSeq || !bytes.Equal(rec.Payload, want.Payload) ||
				rec.Topic != want.Topic {
				t.Errorf("record %d: %+v, was %+v", i, rec, want)
			}
		}
	})
}
