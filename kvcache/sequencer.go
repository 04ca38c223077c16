// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import "math"

// sequencer decides, number by number, what becomes of an engine's messages. It is pure: it does no I/O, knows no time
// and is driven by one caller at a time. The caller obeys the decisions in order: reset first, then the verdict on the
// message in hand, then replay.
//
// An engine numbers its batches from 0 (some from 1) and starts again when it restarts. A life is one such run. What
// proves that an answer comes from the same life is the last delivered batch: its number and its bytes. The caller
// keeps the bytes, and says of each message what they prove.
type sequencer struct {
	// replayable says that there is a replay endpoint to ask.
	replayable bool
	// keep is the policy for history that is lost on an unbroken connection: an unknown bound rather than a reset.
	keep bool
	// want is the first number the caller cares for; above 0 the bound cannot become exact by a replay.
	want uint64

	state  State
	bound  Bound
	reason Reason

	// started says that a batch of the current life was delivered. last is the highest delivered number; everything from
	// the life's first delivered number to last was delivered once or settled.
	started bool
	last    uint64

	// base is the first delivered number of the life. If that is 1, whether there was a 0 shows when a replay still
	// begins with 1 after more than baseLast was published, for a buffer that rolls would have moved on.
	base, baseLast uint64
	baseProof      baseProof
	// owed says that the life was begun while replays were given up: the engine may still have what came before.
	owed bool

	// closing says that the present connection is about to be closed.
	closing bool
	// opened says that the first connection was made and the handler told to start afresh.
	opened bool
	// wasLive says that the stream was complete once.
	wasLive bool
	// missedTo is the number up to which missing ones were counted, so that each is counted once.
	missedTo uint64
	// verified says that what was delivered is known to be of the life that the replay endpoint, or this connection, is
	// of.
	verified bool
	// met says that this connection and the replay endpoint are known to be of one life: a batch came by both, or no
	// batch of the life came by a replay. A connection whose end was not yet read may be of a process that is gone.
	met bool
	// lastLive says that the last delivered batch came by this connection.
	lastLive bool
	// contradictions counts how often this connection and the replay endpoint disagreed, since they last met.
	contradictions int
	// foreign says that the replay endpoint was taken for another engine's, since this connection lived on while they
	// disagreed.
	foreign bool
	// holding says that live messages are kept back until a replay has filled what comes before them.
	holding bool
	// givenUp says that replays failed too often on this connection; it is treated as if there were none.
	givenUp bool
	// newest is the highest number seen live on the current connection.
	newest    uint64
	hasNewest bool
	// heldFirst is the oldest number that is held, if hasHeld; from there to newest everything that came is.
	heldFirst uint64
	hasHeld   bool
	// dropped says that held messages were dropped, for want of room, since the replay that runs was asked for.
	dropped bool

	ask ask
	// failures counts replays in a row that gave no valid answer, stalls those that gave one and nothing new though
	// something is missing.
	failures, stalls int
}

// baseProof says how far it is known that a life began with the number base.
type baseProof uint8

const (
	baseHeard    baseProof = iota // it was the first to be delivered
	baseReplayed                  // a replay from 0 began with it
	baseComplete                  // since then everything was delivered, up to baseLast, that had been published by then
	baseAsked                     // a later replay from 0 has told
)

// proof is what the bytes of a message say about the batch that was delivered under its number.
type proof uint8

const (
	unproven proof = iota // nothing is known of that batch any more, or there was none
	same                  // it is the same, byte for byte
	other                 // it was another one
)

// ask is one replay, asked for and not yet over.
type ask struct {
	purpose purpose
	from    uint64
	// verify says that from was delivered before, so that the answer must begin with it.
	verify bool
	// matched says that it did, byte for byte.
	matched bool
	// count is the number of messages at or after from in the answer so far, newest the number of the last of them.
	count  int
	newest uint64
	// progress says that the answer delivered a batch or settled a number.
	progress bool
}

// purpose is why a replay is asked for. During the first two live messages are held. For the others nothing is known to
// be missing, live messages flow meanwhile, and nothing is lost if it fails.
type purpose uint8

func (p purpose) holds() bool { return p <= askMeet }

const (
	askFill   purpose = iota // to bring what is missing; live messages are held until it has
	askMeet                  // to see whether what came live is of the life that replays brought: its oldest held batch
	askTail                  // to see whether anything was sent that never came
	askRetry                 // to see whether the endpoint answers again, after replays were given up
	askOrigin                // to see whether the life began with number 1
)

// The limits after which the sequencer stops asking for what does not come.
const (
	maxReplayFailures = 3
	maxReplayStalls   = 3
	// With the pace at which the caller asks again these take longer than the end of a connection that broke: about 15 s.
	maxContradictions = 10
)

// endMarker is the number that ends a replay. No batch has it.
const endMarker = math.MaxUint64

type verdict uint8

const (
	drop    verdict = iota // nothing to do with the message
	deliver                // hand it on now
	hold                   // keep it until the replay is over
)

// decision is what the caller has to do.
type decision struct {
	reset   Reason // tell the handler to forget, before anything else
	verdict verdict
	// replay says to end the replay that runs, if any, and to begin the one that sequencer.ask describes.
	replay bool
	// dropHeld says that the messages held so far belong to another life.
	dropHeld bool

	missed    uint64 // numbers newly found missing
	burned    uint64 // numbers found never to have been sent
	duplicate bool   // the message was delivered before
	invalid   bool   // the number makes no sense
	// enough says that the replay that runs has told all it was asked for: what it still sends is not wanted.
	enough bool
	// useful says that the message of a replay brought the replay forward.
	useful bool
	// foreign says that the replay endpoint speaks for another engine, or for another life of this one, than the
	// connection. While a replay runs, it has thereby failed.
	foreign bool
}

// connect tells of a new connection that is subscribed.
func (s *sequencer) connect() (d decision) {
	s.verified, s.hasNewest, s.givenUp, s.closing = false, false, false, false
	s.met, s.lastLive, s.contradictions, s.foreign = false, false, 0, false
	s.hasHeld, s.dropped = false, false
	s.failures, s.stalls = 0, 0
	first := !s.opened
	s.opened = true
	if first {
		s.forget(ReasonStart)
		d.reset = ReasonStart
	}
	if s.replayable {
		s.state = StateSyncing
		if s.wasLive {
			s.state = StateRecovering
		}
		if s.started && !s.keep && (s.bound == BoundUnknown || s.bound == BoundAtLeast && s.owed) {
			// Going on from the last delivered batch would leave the bound as it is for ever; a fresh history does not.
			d.reset = ReasonResync
			s.forget(d.reset)
		}
		s.request(&d)
		return d
	}
	s.state, s.wasLive = StateLive, true
	if s.started {
		s.lower(BoundUnknown, ReasonReconnect)
	}
	return d
}

// check asks the engine a question, while live messages flow: whether it has sent something that never came (the newest
// batch of an engine that has fallen silent would be missed by no other), or what due says is to be asked.
func (s *sequencer) check() (d decision) {
	if s.state != StateLive || s.holding || s.closing || !s.replayable {
		return d
	}
	why := askTail
	if p, ok := s.due(); ok {
		why = p
	}
	s.request(&d)
	s.holding, s.ask.purpose = false, why
	if why == askOrigin {
		s.ask.from, s.ask.verify = 0, false
	}
	return d
}

// due tells which question is to be asked though messages come, if any.
func (s *sequencer) due() (purpose, bool) {
	if s.givenUp {
		return askRetry, true
	}
	if s.base != 1 || !s.started || s.bound != BoundAtLeast ||
		s.reason != ReasonLateStart && s.reason != ReasonHistoryLost {
		return askFill, false
	}
	switch s.baseProof {
	case baseReplayed:
		return askTail, true // the sooner it is complete, the fewer batches it takes to tell
	case baseComplete:
		return askOrigin, s.last > s.baseLast
	}
	return askFill, false
}

// cut tells that the caller wants to begin anew, for a reason of its own, and closes the connection. What that still
// brings is of the past.
func (s *sequencer) cut(reason Reason) (d decision) {
	d.reset, d.dropHeld = reason, true
	s.hasHeld = false
	s.forget(reason)
	s.closing = true
	if s.state == StateLive {
		s.state = StateRecovering
	}
	return d
}

// overflowed tells that the held messages, the one to be held included, were dropped for want of room.
func (s *sequencer) overflowed() { s.hasHeld, s.dropped = false, true }

// disconnect tells that the connection is gone. Held messages are lost with it.
func (s *sequencer) disconnect() {
	s.holding, s.hasHeld = false, false
	s.state = StateConnecting
	if s.wasLive {
		s.state = StateRecovering
	}
}

// live takes a message that came from the subscription.
func (s *sequencer) live(seq uint64, p proof) (d decision) {
	if s.closing {
		return d
	}
	if seq == endMarker {
		d.invalid = true
		return d
	}
	if s.hasNewest && seq <= s.newest {
		if seq == s.last && s.started && p == same {
			d.duplicate = true
			return d
		}
		// A connection carries rising numbers, so one that goes back means another process answers behind it.
		s.newest = seq
		return s.restart(seq)
	}
	s.newest, s.hasNewest = seq, true
	if s.holding {
		d.verdict = hold
		if !s.hasHeld {
			s.heldFirst, s.hasHeld = seq, true
		}
		return d
	}
	return s.next(seq, p, true)
}

// held takes a held message again, in order, after the replay. A decision to replay keeps it and those behind it held.
func (s *sequencer) held(seq uint64, p proof) decision {
	d := s.next(seq, p, false)
	d.dropHeld = false // what is held came by this connection, and so is of the life that begins
	return d
}

// next places a message after the last delivered one. live says that it comes now, and was not held.
func (s *sequencer) next(seq uint64, p proof, live bool) (d decision) {
	asking := s.replayable && !s.givenUp
	switch {
	case !s.started && seq < s.want:
		return d // before what the caller wants
	case !s.started && asking && seq > s.want:
		// The replay said that there was nothing, and yet this is not the first.
		return s.gap(s.want, seq)
	case !s.started:
		s.first(seq)
		s.met = true
		d.verdict = deliver
	case seq == s.last+1 && asking && !s.met:
		return s.meet(seq)
	case seq == s.last+1:
		d.verdict = deliver
	case seq <= s.last && s.verified && p == unproven && live && asking && !s.met && s.contradict(&d):
		// Older than all that was replayed: it was forgotten by the engine meanwhile, and then newer ones will meet, or the
		// endpoint is another engine's that is ahead.
		return s.holdBack(seq, d, askFill)
	case d.foreign:
		return s.trust(seq, d)
	case seq <= s.last && s.verified && p != other:
		d.duplicate = true // it came by replay as well
		if p == same {
			s.meets()
		}
		return d
	case seq <= s.last && s.verified:
		// The replay brought another batch under this number.
		if asking && s.contradict(&d) {
			return s.holdBack(seq, d, askFill)
		}
		return s.trust(seq, d)
	case seq <= s.last:
		return s.restart(seq)
	case asking:
		return s.gap(s.last+1, seq)
	default:
		d.missed = s.miss(s.last+1, seq)
		if s.verified {
			s.lose(seq, &d)
			s.met = true
			break
		}
		// After a reconnect that proved nothing, more or less is missing, or it is another life.
		s.lower(BoundUnknown, ReasonGap)
		d.verdict = deliver
	}
	s.verified = true
	return d
}

// lose gives up what is missing before seq, which comes from an engine that is known to be the same as before.
func (s *sequencer) lose(seq uint64, d *decision) {
	d.verdict = deliver
	s.verified = true
	if s.keep && s.started {
		s.lower(BoundUnknown, ReasonHistoryLost)
		return
	}
	d.reset = ReasonHistoryLost
	s.forget(d.reset)
	s.first(seq)
}

// meets records that the connection and the replay endpoint are of one life.
func (s *sequencer) meets() { s.met, s.contradictions, s.foreign = true, 0, false }

// contradict judges a connection and a replay endpoint that disagree, and reports whether to ask again. Most often the
// connection is of a process that is gone, and its end will be read soon. If it lives on, the endpoint is another
// engine's (the port of another rank), and the connection outranks it.
func (s *sequencer) contradict(d *decision) (again bool) {
	s.contradictions++
	if s.contradictions > maxContradictions {
		d.foreign, s.foreign = true, true
		return false
	}
	s.state = StateRecovering
	return true
}

// trust goes on with the connection alone, and with seq as the first of what is known of it.
func (s *sequencer) trust(seq uint64, d decision) decision {
	d.foreign, d.reset, d.verdict = true, ReasonHistoryLost, deliver
	s.givenUp, s.foreign = true, true
	s.forget(d.reset)
	s.first(seq)
	s.verified, s.met = true, true
	return d
}

// meet asks for seq, which came live behind what came by replays, to see whether both are of one life: then the answer
// brings it too.
func (s *sequencer) meet(seq uint64) (d decision) {
	if s.stalls++; s.stalls > 1 && !s.contradict(&d) {
		s.givenUp = true
		s.lose(seq, &d)
		s.met = true
		return d
	}
	return s.holdBack(seq, d, askMeet)
}

// holdBack makes the decision hold a message, with those behind it, and ask for a replay.
func (s *sequencer) holdBack(seq uint64, d decision, p purpose) decision {
	d.verdict = hold
	s.heldFirst, s.hasHeld = seq, true // what was held before it is placed
	s.request(&d)
	s.ask.purpose = p
	return d
}

// gap asks for the numbers from next up to seq, which are missing, and keeps seq for later. If asking did not help
// before, they are lost and seq begins the history anew.
func (s *sequencer) gap(next, seq uint64) (d decision) {
	d.missed = s.miss(next, seq)
	switch {
	case s.stalls < maxReplayStalls:
		s.stalls++
		s.state = StateRecovering
		return s.holdBack(seq, d, askFill)
	case s.started && !s.met && s.contradict(&d):
		// Not even seq was in the answers, and the engine had sent it before they were asked for.
		return s.holdBack(seq, d, askFill)
	}
	s.givenUp = s.givenUp || d.foreign
	s.lose(seq, &d)
	s.met = true
	return d
}

// miss returns how many of the numbers from next up to seq were not counted as missing before.
func (s *sequencer) miss(next, seq uint64) uint64 {
	next = max(next, s.missedTo)
	s.missedTo = max(s.missedTo, seq)
	return s.missedTo - next
}

// restart forgets the life that ended, and goes on with seq as a message of the new one.
func (s *sequencer) restart(seq uint64) (d decision) {
	d.reset, d.dropHeld = ReasonRestart, true
	s.forget(ReasonRestart)
	s.hasHeld = false
	if s.replayable && !s.givenUp {
		s.stalls = 0
		s.state = StateRecovering
		return s.holdBack(seq, d, askFill)
	}
	s.first(seq)
	s.verified, s.met = true, true
	d.verdict = deliver
	return d
}

// replayed takes one message of the replay that runs.
func (s *sequencer) replayed(seq uint64, p proof) (d decision) {
	a := &s.ask
	if s.closing {
		d.enough = true
		return d
	}
	if seq == endMarker {
		d.invalid = true
		return d
	}
	if seq < a.from {
		return d // older than was asked for
	}
	if a.count > 0 && seq <= a.newest {
		d.invalid = true // engines send the oldest first, and each once
		return d
	}
	first := a.count == 0
	if first && !a.verify && s.started && a.purpose != askOrigin {
		d.enough = true // the life began live since this was asked for; nothing in the answer would tell whether it is its
		return d
	}
	a.count++
	a.newest = seq
	if first && a.verify && seq == a.from {
		switch {
		case p != same && s.verified:
			// The connection was proven to be of the life that sent p, or the endpoint was: one of them is of another now.
			return s.disagreed(d)
		case p != same:
			return s.replaced()
		}
		s.verified, a.matched = true, true
		if s.lastLive && s.last == a.from {
			s.meets()
		}
		d.duplicate, d.useful = true, true
		return d
	}
	switch {
	case a.purpose == askMeet && (!first || seq <= s.newest):
		switch p {
		case same:
			s.meets()
			d.enough = true
		case other:
			return s.disagreed(d)
		}
		return d
	case a.purpose == askRetry:
		return d // a replay is to be good to its end before anything is built on it; what it brings can be asked for again
	case a.purpose == askOrigin:
		s.baseProof, d.enough = baseAsked, true
		if seq == s.base && p != other && s.bound == BoundAtLeast {
			s.bound, s.reason = BoundExact, ""
		}
		return d
	case first && a.verify && seq <= s.last:
		d.duplicate = true // it came live since it was asked for
		return d
	case first && a.verify && !a.purpose.holds():
		s.request(&d) // so that what is on its way is held
		return d
	case first && a.verify && s.met && s.hasHeld && s.heldFirst <= s.last+1:
		d.enough = true // what the engine has forgotten came live meanwhile
		return d
	case first && a.verify && s.verified && s.keep:
		d.missed = s.miss(s.last+1, seq)
		s.lose(seq, &d)
		s.met = false
	case first && a.verify:
		// The engine no longer holds the batch that would tell whether this is the same life, or never sent that number in
		// its new life. What it has from the beginning on tells more.
		if s.verified {
			d.missed = s.miss(s.last+1, seq)
		}
		d.reset = ReasonHistoryLost
		s.forget(d.reset)
		s.state = StateRecovering
		s.request(&d)
		return d
	}
	switch {
	case !s.started:
		s.first(seq)
		s.baseProof = baseReplayed
	case seq <= s.last:
		d.duplicate = true
		return d
	case d.verdict == deliver:
	case seq > s.last+1 && a.verify && a.count == 2 && a.from == s.last:
		// The number asked for and this one came with nothing between them, and nothing can have been dropped yet: the
		// numbers between were taken and never sent.
		d.burned = seq - s.last - 1
	case seq > s.last+1:
		// Dropped on the way, or burned: asking from the last delivered number will tell.
		s.request(&d)
		return d
	}
	if s.hasNewest && seq == s.newest && !s.met {
		// The connection brought it too, held or not.
		switch p {
		case other:
			d.verdict = drop
			return s.disagreed(d)
		case same:
			s.meets()
		}
	}
	s.verified = true
	a.progress = true
	s.stalls = 0
	d.verdict, d.useful = deliver, true
	// Where the replay has met what is held, the rest is held, and the bytes of the one they share tell that both are of
	// one engine.
	d.enough = a.purpose == askFill && s.hasHeld && seq >= s.heldFirst
	return d
}

// disagreed ends a replay that contradicts the connection. A mere question is left at that.
func (s *sequencer) disagreed(d decision) decision {
	if !s.ask.purpose.holds() {
		d.foreign = true
	} else if s.contradict(&d) {
		p := s.ask.purpose
		s.request(&d)
		s.ask.purpose = p
	}
	return d
}

// resync ends the time without replays, since the endpoint answers again: what was in doubt is fetched anew.
func (s *sequencer) resync() (d decision) {
	s.givenUp = false
	s.failures, s.stalls = 0, 0
	if s.bound == BoundExact || s.keep {
		return d
	}
	if s.started {
		d.reset = ReasonResync
		s.forget(d.reset)
	}
	s.state = StateRecovering
	s.request(&d)
	return d
}

// replaced forgets the life that ended, which a replay showed, and asks for the new one from its beginning.
// What is held came by a new connection, and stays.
func (s *sequencer) replaced() (d decision) {
	d.reset = ReasonRestart
	s.forget(d.reset)
	s.state, s.givenUp = StateRecovering, false
	s.request(&d)
	return d
}

// replayEnd says how a replay with a valid answer ended.
type replayEnd uint8

const (
	endUnwanted replayEnd = iota // another replay is wanted instead
	endMarked                    // by the end marker
	endSilent                    // after some messages nothing more came
	endEnough                    // by a decision that said so
)

// replayEnded tells that no more is coming. If the decision is not to replay again, the caller passes the held messages
// to held, then calls settle.
func (s *sequencer) replayEnded(end replayEnd) (d decision) {
	a, dropped := s.ask, s.dropped
	s.dropped = false
	marker := end == endMarked
	if end == endEnough || s.closing {
		s.failures = 0
		return d
	}
	switch {
	case a.count == 0 && !marker:
		return s.replayFailed()
	case a.count == 0 && a.verify && s.verified:
		// It denies what this very connection, or this very endpoint, has brought.
		if d = s.disagreed(d); !d.foreign {
			return d
		}
		d = s.replayFailed()
		d.foreign = true
		return d
	case a.count == 0 && a.verify:
		// Not even the number asked for: the process that sent it is gone.
		s.failures = 0
		return s.replaced()
	case a.purpose == askRetry:
		// A long answer may lose its end. One that does not begin with the last batch is of a buffer that has rolled, or of
		// another engine.
		if (a.matched || !s.foreign) && (marker || a.count > 1 || !a.verify) {
			return s.resync()
		}
		return d
	case a.purpose == askOrigin:
		return d
	case a.count == 0 && s.want == 0 && !s.hasNewest:
		// Nothing was ever published: the empty history is whole.
		s.bound, s.reason = BoundExact, ""
	case a.count == 0 && s.want > 0:
		s.reason = ReasonLateStart
	}
	// An answer can lose its end, with the marker or before it, and a hold can overflow. Whoever asks again from the last
	// delivered number and gets nothing newer, and the marker, has seen the end.
	if a.progress || dropped {
		s.failures = 0
		s.request(&d)
		return d
	}
	if !marker {
		return s.replayFailed()
	}
	s.failures = 0
	if s.baseProof == baseReplayed {
		s.baseLast, s.baseProof = s.last, baseComplete
	}
	s.verified = true
	return d
}

// replayFailed tells that the replay gave no valid answer. The decision is to ask again, or to go on without.
func (s *sequencer) replayFailed() (d decision) {
	if !s.ask.purpose.holds() || s.closing {
		return d
	}
	if s.ask.progress {
		s.failures = 0 // it brought something before it broke
	}
	s.failures++
	if s.failures < maxReplayFailures {
		s.request(&d)
		return d
	}
	s.givenUp = true
	switch {
	case s.started && s.verified:
		s.lower(BoundUnknown, ReasonGap)
	case s.started:
		s.lower(BoundUnknown, ReasonReconnect)
	}
	return d
}

// settle tells that the held messages were all placed. From now on live messages are handed on as they come, unless one
// that was seen is neither here nor was it held, for want of room: then another replay has to bring it.
func (s *sequencer) settle() (d decision) {
	if s.closing {
		return d
	}
	s.hasHeld = false
	if s.hasNewest && s.newest >= s.want && (!s.started || s.newest > s.last) {
		switch {
		case s.givenUp || !s.replayable || s.keep && s.stalls >= maxReplayStalls:
			if s.started { // else nothing is claimed
				s.lower(BoundUnknown, ReasonGap)
			}
		case s.stalls < maxReplayStalls:
			s.stalls++
			s.request(&d)
			return d
		default:
			d.reset = ReasonHistoryLost
			s.forget(d.reset)
		}
	}
	s.holding = false
	s.stalls = 0
	s.state, s.wasLive = StateLive, true
	return d
}

// delivered records that a batch was handed on, and whether it came by a replay.
func (s *sequencer) delivered(seq uint64, replayed bool) {
	s.started, s.last, s.lastLive = true, seq, !replayed
}

// cleared tells that the batch just delivered emptied the engine's cache: nothing older matters any more.
func (s *sequencer) cleared() { s.bound, s.reason = BoundExact, "" }

// unreadable tells that something in the stream could not be read. If it may have removed blocks, everything claimed so
// far is in doubt and forgotten; the numbers go on.
func (s *sequencer) unreadable(mayRemove bool) (d decision) {
	if mayRemove && s.keep {
		s.lower(BoundUnknown, ReasonUnreadable)
		return d
	}
	if mayRemove {
		d.reset = ReasonUnreadable
		s.bound, s.reason = BoundAtLeast, ReasonUnreadable
		return d
	}
	s.lower(BoundAtLeast, ReasonUnreadable)
	return d
}

// request makes the decision ask for a replay: from the last delivered number, whose bytes prove the life, else from
// the first one wanted.
func (s *sequencer) request(d *decision) {
	s.holding, s.dropped = true, false
	s.ask = ask{from: s.want}
	if s.started {
		s.ask = ask{from: s.last, verify: true}
	}
	d.replay = true
}

// forget ends a life. Nothing is claimed any more, so nothing claimed is gone.
func (s *sequencer) forget(reason Reason) {
	s.started, s.missedTo = false, 0
	s.baseProof, s.owed = baseHeard, false
	s.met = false
	s.bound, s.reason = BoundAtLeast, reason
	if reason != ReasonStart {
		s.want = 0 // it meant a number of the life that ended
	}
}

// first judges the first number of a life.
func (s *sequencer) first(seq uint64) {
	s.base, s.baseProof, s.owed = seq, baseHeard, s.givenUp
	switch {
	case seq == 0:
		s.bound, s.reason = BoundExact, ""
	case s.reason == ReasonStart || s.reason == "": // nothing was known, or that there was nothing yet
		s.bound, s.reason = BoundAtLeast, ReasonLateStart
	default:
		s.bound, s.reason = BoundAtLeast, ReasonHistoryLost
	}
}

// lower takes the bound down to at most b.
func (s *sequencer) lower(b Bound, reason Reason) {
	if b < s.bound {
		s.bound, s.reason = b, reason
	}
}
