// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package recording reads and writes recorded event streams, one message per line.
//
// A line is a JSON object {"received_at","topic","seq","payload"} with the payload in base64, or `seq hex`, or hex
// alone. The forms may be mixed. A file may be gzipped.
package recording

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

// MaxLine is the longest line that a Reader takes, in bytes: enough for a message of 64 MiB in hex.
const MaxLine = 2*64<<20 + 64<<10

// Record is one message.
type Record struct {
	// ReceivedAt is when the message came; zero where the line does not say.
	ReceivedAt time.Time
	Topic      string
	// Seq is the engine's number of the message. HasSeq is false where the line has none.
	Seq    uint64
	HasSeq bool
	// Payload is what the engine sent, byte for byte.
	Payload []byte
}

// LineError reports a line that is not a message. The lines after it can still be read.
type LineError struct {
	Line int // the first line is 1
	Err  error
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }
func (e *LineError) Unwrap() error { return e.Err }

// What can be wrong with a line. A LineError wraps one of these or says more.
var (
	ErrEmptyLine  = errors.New("it is empty, where a payload in hex or a record in JSON belongs")
	ErrLongLine   = fmt.Errorf("it is longer than %d bytes", MaxLine)
	ErrManyFields = errors.New("it has more than two fields, where `hex` or `seq hex` belongs")
	ErrNoPayload  = errors.New(`the record has no "payload"`)
	errNotASeq    = errors.New("the first of two fields is not a sequence number")
	errNotHex     = errors.New("the payload is not hex")
	errNotARecord = errors.New("it is not a JSON record")
	errNotBase64  = errors.New(`"payload" is not base64`)
	errNotATime   = errors.New(`"received_at" is not an RFC 3339 time`)
	errCutGzip    = errors.New("the gzip data ends early: the file was cut off")
)

var (
	gzipMagic     = []byte{0x1f, 0x8b}
	byteOrderMark = []byte{0xef, 0xbb, 0xbf}
)

const bufferSize = 64 << 10

// Reader reads a recording line by line in bounded memory.
type Reader struct {
	in   *bufio.Reader
	max  int
	line int
	buf  []byte
	rec  Record
	hex  []byte
}

// NewReader reads from r, which may be gzipped. The error is non-nil if it looks gzipped and is not.
func NewReader(r io.Reader) (*Reader, error) { return newReader(r, MaxLine) }

func newReader(r io.Reader, maxLine int) (*Reader, error) {
	in := bufio.NewReaderSize(r, bufferSize)
	// A short or empty input is not gzip; what is wrong with it shows when it is read.
	if head, _ := in.Peek(len(gzipMagic)); bytes.Equal(head, gzipMagic) {
		unzipped, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("it looks gzipped and is not: %w", err)
		}
		in = bufio.NewReaderSize(unzipped, bufferSize)
	}
	return &Reader{in: in, max: maxLine}, nil
}

// Line returns the number of the line that Next read last.
func (r *Reader) Line() int { return r.line }

// Next returns the next message, valid until the following call. A *LineError costs that line only; io.EOF is the end;
// any other error ends the recording too.
func (r *Reader) Next() (*Record, error) {
	line, err := r.readLine()
	if err != nil {
		return nil, err
	}
	if err := r.parse(line); err != nil {
		return nil, &LineError{Line: r.line, Err: err}
	}
	return &r.rec, nil
}

// readLine returns a line without its end. It is valid until the next call.
func (r *Reader) readLine() ([]byte, error) {
	r.buf = r.buf[:0]
	complete, long := r.line, false
	for {
		part, err := r.in.ReadSlice('\n')
		if len(part) > 0 {
			r.line = complete + 1
		}
		long = long || len(r.buf)+len(part) > r.max
		if !long {
			r.buf = append(r.buf, part...)
		}
		switch {
		case err == nil:
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.ErrUnexpectedEOF):
			// What came of the last line is no line: half a payload can decode to something else.
			return nil, fmt.Errorf("after line %d: %w", complete, errCutGzip)
		case !errors.Is(err, io.EOF):
			return nil, fmt.Errorf("after line %d: %w", complete, err)
		case len(r.buf) == 0 && !long:
			return nil, io.EOF
		}
		if long {
			return nil, &LineError{Line: r.line, Err: ErrLongLine}
		}
		if r.line == 1 {
			return bytes.TrimSpace(bytes.TrimPrefix(r.buf, byteOrderMark)), nil
		}
		return bytes.TrimSpace(r.buf), nil
	}
}

func (r *Reader) parse(line []byte) error {
	r.rec = Record{}
	if len(line) == 0 {
		return ErrEmptyLine
	}
	if line[0] == '{' {
		return r.parseJSON(line)
	}
	digits := line
	if i := bytes.IndexAny(line, " \t"); i >= 0 {
		digits = bytes.TrimLeft(line[i:], " \t")
		if bytes.ContainsAny(digits, " \t") {
			return ErrManyFields
		}
		seq, err := strconv.ParseUint(string(line[:min(i, 32)]), 10, 64)
		if err != nil {
			return fmt.Errorf("%w: %.32q", errNotASeq, line[:i])
		}
		r.rec.Seq, r.rec.HasSeq = seq, true
	}
	r.hex = append(r.hex[:0], make([]byte, hex.DecodedLen(len(digits)))...)
	if _, err := hex.Decode(r.hex, digits); err != nil {
		return fmt.Errorf("%w: %w", errNotHex, err)
	}
	r.rec.Payload = r.hex
	return nil
}

func (r *Reader) parseJSON(line []byte) error {
	var fields struct {
		ReceivedAt string  `json:"received_at"`
		Topic      string  `json:"topic"`
		Seq        *uint64 `json:"seq"`
		Payload    *string `json:"payload"`
	}
	if err := json.Unmarshal(line, &fields); err != nil {
		return fmt.Errorf("%w: %w", errNotARecord, inWords(err))
	}
	if fields.Payload == nil {
		return ErrNoPayload
	}
	payload, err := base64.StdEncoding.DecodeString(*fields.Payload)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotBase64, err)
	}
	if fields.ReceivedAt != "" {
		at, err := time.Parse(time.RFC3339Nano, fields.ReceivedAt)
		if err != nil {
			return fmt.Errorf("%w: %.64q", errNotATime, fields.ReceivedAt)
		}
		r.rec.ReceivedAt = at
	}
	r.rec.Topic, r.rec.Payload = fields.Topic, payload
	if fields.Seq != nil {
		r.rec.Seq, r.rec.HasSeq = *fields.Seq, true
	}
	return nil
}

// inWords replaces what encoding/json says of a field of the wrong type, which names types of Go.
func inWords(err error) error {
	wrong := (*json.UnmarshalTypeError)(nil)
	if !errors.As(err, &wrong) {
		return err
	}
	want := "a string"
	if wrong.Field == "seq" {
		want = "a sequence number, from 0 to 18446744073709551615"
	}
	return fmt.Errorf("%q is not %s: %.40s", wrong.Field, want, wrong.Value)
}
