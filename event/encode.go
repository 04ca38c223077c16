// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event

import (
	"errors"
	"fmt"
	"math"
	"math/bits"

	"github.com/tinylib/msgp/msgp"
)

// Form is the encoding of a vLLM release, named after the first that has it.
type Form uint8

// The forms, oldest first. The zero Form is none of them. Up to VLLM022 an event is an array, of more positions from
// one form to the next; from VLLM024 on it is a map.
const (
	VLLM090  Form = iota + 1 // batches without a rank; signed hashes
	VLLM091                  // data_parallel_rank
	VLLM0102                 // medium; unsigned hashes
	VLLM014                  // lora_name
	VLLM017                  // extra_keys
	VLLM020                  // group_idx
	VLLM022                  // kv_cache_spec_kind and kv_cache_spec_sliding_window
	VLLM024                  // maps
	VLLM026                  // locality
	VLLM032                  // ownership and session_id
)

var formNames = [...]string{
	VLLM090:  "vllm-0.9.0",
	VLLM091:  "vllm-0.9.1",
	VLLM0102: "vllm-0.10.2",
	VLLM014:  "vllm-0.14",
	VLLM017:  "vllm-0.17",
	VLLM020:  "vllm-0.20",
	VLLM022:  "vllm-0.22",
	VLLM024:  "vllm-0.24",
	VLLM026:  "vllm-0.26",
	VLLM032:  "vllm-0.32",
}

// String returns the name that ParseForm takes, such as vllm-0.10.2.
func (f Form) String() string {
	if !f.valid() {
		return "unknown"
	}
	return formNames[f]
}

func (f Form) valid() bool { return f >= VLLM090 && f <= VLLM032 }

// ParseForm returns the form of this name.
func ParseForm(name string) (Form, error) {
	for f := VLLM090; f <= VLLM032; f++ {
		if formNames[f] == name {
			return f, nil
		}
	}
	return 0, fmt.Errorf("event: unknown form %q", name)
}

// ErrForm is what Append's errors match.
var ErrForm = errors.New("event: not expressible in this form")

// FormError says what in a batch a form has no place for. It matches ErrForm.
type FormError struct {
	Form  Form
	Event int    // index in Batch.Events; -1 for the batch itself
	What  string // the field, by its key, and what is wrong with it
}

func (e *FormError) Error() string {
	if e.Event < 0 {
		return fmt.Sprintf("event: form %v cannot express the batch's %s", e.Form, e.What)
	}
	return fmt.Sprintf("event: form %v cannot express event %d: %s", e.Form, e.Event, e.What)
}

// Is reports whether target is ErrForm.
func (e *FormError) Is(target error) bool { return target == ErrForm }

// Append appends the payload that a release of form f sends for b: time, rank and events. Skipped and UnknownFields
// are not part of it, and Event.Map is the form's to choose. Decoding the payload gives the same values back, except
// that an extra key of KeyOther that one of the other kinds can hold comes back as that kind.
//
// If b holds what the form has no place for, or no value that can be sent, Append returns dst and a *FormError.
func (b *Batch) Append(dst []byte, f Form) ([]byte, error) {
	if !f.valid() {
		return dst, &FormError{Form: f, Event: -1, What: "form: unknown"}
	}
	if t := b.Time; t.OK && (math.IsNaN(t.V) || math.IsInf(t.V, 0)) {
		return dst, &FormError{Form: f, Event: -1, What: "ts: not a finite number"}
	}
	if f < VLLM091 && b.Rank.OK {
		return dst, &FormError{Form: f, Event: -1, What: "data_parallel_rank"}
	}
	p := msgp.AppendArrayHeader(dst, 3)
	if f < VLLM091 {
		p = msgp.AppendArrayHeader(dst, 2)
	}
	if b.Time.OK {
		p = msgp.AppendFloat64(p, b.Time.V)
	} else {
		p = msgp.AppendNil(p)
	}
	p = msgp.AppendArrayHeader(p, uint32(len(b.Events)))
	for i := range b.Events {
		e := &b.Events[i]
		if what := e.unfit(f); what != "" {
			return dst, &FormError{Form: f, Event: i, What: what}
		}
		p = e.appendTo(p, f)
	}
	if f >= VLLM091 {
		p = appendOpt(p, b.Rank)
	}
	return p, nil
}

// Trim takes out of b what engines of form f do not say: the fields that came with later releases, and the rank before
// VLLM091. Simulators fill in everything and leave the rest to the form. What no release can say stays, and Append
// refuses it.
func (b *Batch) Trim(f Form) {
	if !f.valid() {
		return
	}
	if f < VLLM091 {
		b.Rank = Opt[int64]{}
	}
	for i := range b.Events {
		e := &b.Events[i]
		if e.Type < BlockStored || e.Type > AllBlocksCleared {
			continue
		}
		later := keys(VLLM032.fields(e.Type)...) &^ keys(f.fields(e.Type)...)
		for field := fieldMedium; field <= fieldSessionID; field++ {
			if later>>field&1 == 1 {
				e.clear(field)
			}
		}
	}
}

// clear removes a field that some release of vLLM does not have.
func (e *Event) clear(f field) {
	switch f {
	case fieldMedium:
		e.Medium = nil
	case fieldLoRAName:
		e.LoRAName = nil
	case fieldExtraKeys:
		e.ExtraKeys = nil
	case fieldGroup:
		e.Group = Opt[int64]{}
	case fieldSpecKind:
		e.SpecKind = nil
	case fieldWindow:
		e.SlidingWindow = Opt[int64]{}
	case fieldLocality:
		e.Locality = nil
	case fieldOwnership:
		e.Ownership = nil
	case fieldSessionID:
		e.SessionID = nil
	}
}

// width is how many positions an event's array has after the tag.
func (f Form) width(t Type) int {
	switch {
	case t == BlockStored && f < VLLM0102:
		return 5
	case t == BlockStored && f < VLLM014:
		return 6
	case t == BlockStored && f < VLLM017:
		return 7
	case t == BlockStored && f < VLLM020:
		return 8
	case t == BlockStored && f < VLLM022:
		return 9
	case t == BlockStored:
		return 11
	case t == BlockRemoved && f < VLLM0102:
		return 1
	case t == BlockRemoved && f < VLLM020:
		return 2
	case t == BlockRemoved:
		return 3
	}
	return 0
}

// The keys of maps in the order in which they are sent, and of these the ones that are sent even if nil.
var (
	storedKeys = []field{
		fieldHashes, fieldParent, fieldTokens, fieldBlockSize, fieldLoRAID, fieldMedium, fieldLoRAName, fieldExtraKeys,
		fieldGroup, fieldSpecKind, fieldWindow, fieldLocality, fieldOwnership, fieldSessionID,
	}
	removedKeys = []field{fieldHashes, fieldMedium, fieldGroup, fieldLocality, fieldOwnership}
	always      = keys(fieldHashes, fieldParent, fieldTokens, fieldBlockSize, fieldLoRAID, fieldMedium, fieldLoRAName)
)

// fields returns what an event of type t can carry, in the order in which it is sent.
func (f Form) fields(t Type) []field {
	order := layouts[t].positions[:f.width(t)]
	switch {
	case t == BlockStored && f >= VLLM024:
		order = storedKeys
	case t == BlockRemoved && f >= VLLM024:
		order = removedKeys
	}
	last := fieldWindow
	switch {
	case f >= VLLM032:
		last = fieldSessionID
	case f >= VLLM026:
		last = fieldLocality
	}
	for len(order) > 0 && order[len(order)-1] > last {
		order = order[:len(order)-1]
	}
	return order
}

// present returns a bit for each field of e that is not nil.
func (e *Event) present() (set uint32) {
	for f, ok := range [numFields]bool{
		fieldHashes:    e.Hashes != nil,
		fieldParent:    e.Parent.OK,
		fieldTokens:    e.Tokens != nil,
		fieldBlockSize: e.BlockSize.OK,
		fieldLoRAID:    e.LoRAID.OK,
		fieldMedium:    e.Medium != nil,
		fieldLoRAName:  e.LoRAName != nil,
		fieldExtraKeys: e.ExtraKeys != nil,
		fieldGroup:     e.Group.OK,
		fieldSpecKind:  e.SpecKind != nil,
		fieldWindow:    e.SlidingWindow.OK,
		fieldLocality:  e.Locality != nil,
		fieldOwnership: e.Ownership != nil,
		fieldSessionID: e.SessionID != nil,
		fieldCacheSalt: e.CacheSalt != nil,
	} {
		if ok {
			set |= 1 << f
		}
	}
	return set
}

// unfit returns what form f cannot express of e, or "".
func (e *Event) unfit(f Form) string {
	if e.Type < BlockStored || e.Type > AllBlocksCleared {
		return "type: unknown"
	}
	if excess := e.present() &^ keys(f.fields(e.Type)...); excess != 0 {
		return names[bits.TrailingZeros32(excess)]
	}
	if e.Stride > 1 {
		return "token_ids: pairs"
	}
	for _, block := range e.ExtraKeys {
		for _, k := range block {
			if !k.sound() {
				return "extra_keys: not a key"
			}
		}
	}
	return ""
}

// sound reports whether k can be encoded.
func (k *Key) sound() bool {
	if k.Kind == KeyOther {
		rest, ok := skip(k.Text)
		return ok && len(rest) == 0
	}
	return k.Kind >= KeyText && k.Kind <= KeyInt
}

func (e *Event) appendTo(p []byte, f Form) []byte {
	order := f.fields(e.Type)
	if f < VLLM024 {
		p = msgp.AppendArrayHeader(p, uint32(1+len(order)))
		p = msgp.AppendString(p, e.Type.String())
		for _, field := range order {
			p = e.appendField(p, field, f)
		}
		return p
	}
	send := (e.present() | always) & keys(order...)
	p = msgp.AppendMapHeader(p, uint32(1+bits.OnesCount32(send)))
	p = msgp.AppendString(p, names[fieldType])
	p = msgp.AppendString(p, e.Type.String())
	for _, field := range order {
		if send>>field&1 == 1 {
			p = msgp.AppendString(p, names[field])
			p = e.appendField(p, field, f)
		}
	}
	return p
}

func (e *Event) appendField(p []byte, field field, f Form) []byte {
	switch field {
	case fieldHashes:
		p = msgp.AppendArrayHeader(p, uint32(len(e.Hashes)))
		for _, h := range e.Hashes {
			p = appendHash(p, h, f)
		}
		return p
	case fieldParent:
		if e.Parent.OK {
			return appendHash(p, e.Parent.V, f)
		}
	case fieldTokens:
		if e.Tokens != nil {
			p = msgp.AppendArrayHeader(p, uint32(len(e.Tokens)))
			for _, id := range e.Tokens {
				p = msgp.AppendUint32(p, id)
			}
			return p
		}
	case fieldBlockSize:
		return appendOpt(p, e.BlockSize)
	case fieldLoRAID:
		return appendOpt(p, e.LoRAID)
	case fieldMedium:
		return appendText(p, e.Medium)
	case fieldLoRAName:
		return appendText(p, e.LoRAName)
	case fieldExtraKeys:
		if e.ExtraKeys != nil {
			return appendExtraKeys(p, e.ExtraKeys)
		}
	case fieldGroup:
		return appendOpt(p, e.Group)
	case fieldSpecKind:
		return appendText(p, e.SpecKind)
	case fieldWindow:
		return appendOpt(p, e.SlidingWindow)
	case fieldLocality:
		return appendText(p, e.Locality)
	case fieldOwnership:
		return appendText(p, e.Ownership)
	case fieldSessionID:
		return appendText(p, e.SessionID)
	}
	return msgp.AppendNil(p)
}

func appendHash(p []byte, h Hash, f Form) []byte {
	if f < VLLM0102 {
		return appendInt(p, int64(h))
	}
	return msgp.AppendUint64(p, uint64(h))
}

// appendInt writes positive integers in the unsigned formats, as Python's encoders do and msgp does not.
func appendInt(p []byte, i int64) []byte {
	if i >= 0 {
		return msgp.AppendUint64(p, uint64(i))
	}
	return msgp.AppendInt64(p, i)
}

func appendOpt(p []byte, v Opt[int64]) []byte {
	if !v.OK {
		return msgp.AppendNil(p)
	}
	return appendInt(p, v.V)
}

func appendText(p, s []byte) []byte {
	if s == nil {
		return msgp.AppendNil(p)
	}
	return msgp.AppendStringFromBytes(p, s)
}

func appendExtraKeys(p []byte, blocks []BlockKeys) []byte {
	p = msgp.AppendArrayHeader(p, uint32(len(blocks)))
	for _, block := range blocks {
		if block == nil {
			p = msgp.AppendNil(p)
			continue
		}
		p = msgp.AppendArrayHeader(p, uint32(len(block)))
		for _, k := range block {
			switch k.Kind {
			case KeyText:
				p = msgp.AppendStringFromBytes(p, k.Text)
			case KeyTextOffset:
				p = msgp.AppendArrayHeader(p, 2)
				p = msgp.AppendStringFromBytes(p, k.Text)
				p = appendInt(p, k.Number)
			case KeyBytes:
				p = msgp.AppendBytes(p, k.Text)
			case KeyInt:
				p = appendInt(p, k.Number)
			case KeyOther:
				p = append(p, k.Text...)
			}
		}
	}
	return p
}
