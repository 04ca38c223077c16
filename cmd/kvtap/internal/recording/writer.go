// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package recording

import (
	"bufio"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
)

// timeLayout always has its digits below the second, so that lines of one file line up and sort as text.
const timeLayout = "2006-01-02T15:04:05.000000Z07:00"

// Gzipped reports whether a recording of that name is to be gzipped.
func Gzipped(name string) bool { return strings.HasSuffix(name, ".gz") }

// Writer writes a recording. Nothing is sure to have reached the underlying writer before Flush or Close.
type Writer struct {
	out  *bufio.Writer
	gzip *gzip.Writer // nil if the recording is plain
	buf  []byte
}

// NewWriter writes to w, gzipped or plain.
func NewWriter(w io.Writer, gzipped bool) *Writer {
	r := &Writer{}
	if gzipped {
		r.gzip = gzip.NewWriter(w)
		w = r.gzip
	}
	r.out = bufio.NewWriterSize(w, bufferSize)
	return r
}

// Write appends one message. A zero ReceivedAt and a missing number are written as null.
func (w *Writer) Write(rec *Record) error {
	b := append(w.buf[:0], `{"received_at":`...)
	if rec.ReceivedAt.IsZero() {
		b = append(b, "null"...)
	} else {
		b = append(b, '"')
		b = rec.ReceivedAt.UTC().AppendFormat(b, timeLayout)
		b = append(b, '"')
	}
	b = append(b, `,"topic":`...)
	b = render.AppendString(b, rec.Topic)
	b = append(b, `,"seq":`...)
	if rec.HasSeq {
		b = strconv.AppendUint(b, rec.Seq, 10)
	} else {
		b = append(b, "null"...)
	}
	b = append(b, `,"payload":"`...)
	b = base64.StdEncoding.AppendEncode(b, rec.Payload)
	b = append(b, "\"}\n"...)
	w.buf = b
	if _, err := w.out.Write(b); err != nil {
		return fmt.Errorf("write the recording: %w", err)
	}
	return nil
}

// Flush makes everything written so far readable, at a small cost in size if the recording is gzipped.
func (w *Writer) Flush() error {
	err := w.out.Flush()
	if err == nil && w.gzip != nil {
		err = w.gzip.Flush()
	}
	if err != nil {
		return fmt.Errorf("write the recording: %w", err)
	}
	return nil
}

// Close ends the recording so that it is complete and valid. It does not close the underlying writer.
func (w *Writer) Close() error {
	err := w.out.Flush()
	if err == nil && w.gzip != nil {
		err = w.gzip.Close()
	}
	if err != nil {
		return fmt.Errorf("end the recording: %w", err)
	}
	return nil
}
