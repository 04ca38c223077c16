// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/recording"
	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
)

// simFlags say what engine to simulate.
type simFlags struct {
	config   enginesim.Config
	pub      string
	replay   string
	form     string
	framing  string
	rate     float64
	duration time.Duration

	faults     []string
	faultsSeed uint64
	faultsRate float64

	play  string
	speed float64
	wait  bool
	exit  bool
}

var framings = map[string]enginesim.Framing{
	"auto":     enginesim.FramingOfForm,
	"topic":    enginesim.FramingTopic,
	"no-topic": enginesim.FramingNoTopic,
}

func (a *app) simCommand() *cobra.Command {
	var f simFlags
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Simulate an engine, or play a recording back",
		Long: `Simulate an engine: requests that share system prompts and go on over several turns fill a paged KV
cache, whose events are published and replayed as vLLM does it.

With --play, the messages of a recording are published instead, byte for byte and under their own numbers: at once, at
--rate per second, or at --speed times their own pace by the engine's clock. Where the numbers go back the simulated
engine restarts. Then it stays up, so that the messages can be replayed, until interrupted or, with --exit, until
subscribers have had a second to take the last ones.

With --fault or --faults-rate the engine, its host and its network misbehave, at given steps of the scheduler or at
random. A fault is KIND[:N][:DURATION]@STEP, steps count from 0, and the kinds are:

` + faultHelp(),
		Example: `  kvtap sim
  kvtap sim --pub 'tcp://*:5557' --replay 'tcp://*:5558' --form vllm-0.24 --rate 100
  kvtap sim --play run.jsonl.gz --speed 1 --wait-subscriber
  kvtap sim --fault drop_live:3@100 --fault kill:2s@200
  kvtap sim --faults-rate 0.02 --faults-seed 7`,
		Args:              exactly(),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			f.config.Logger = a.clientLog()
			ctx := cmd.Context()
			if f.duration > 0 {
				inner, cancel := context.WithTimeoutCause(ctx, f.duration, errDone)
				defer cancel()
				ctx = inner
			}
			if err := a.sim(ctx, &f); !errors.Is(err, errDone) {
				return err
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.pub, "pub", "tcp://127.0.0.1:5557", "`endpoint` to publish at; port 0 is any free port")
	flags.StringVar(&f.replay, "replay", "tcp://127.0.0.1:5558", "`endpoint` to answer replay requests at")
	flags.BoolVar(&f.config.NoReplay, "no-replay", false, "have no replay endpoint")
	flags.BoolVar(&f.config.Connect, "connect", false,
		"connect out to --pub, where kvtap tail --listen waits, instead of binding it")
	flags.StringVar(&f.config.Topic, "topic", "", "`topic` of all messages")
	flags.StringVar(&f.config.Model, "model", "sim", "`name` of the model, for the log")
	flags.IntVar(&f.config.Rank, "rank", 0, "data-parallel `rank` in the batches; negative leaves it out")
	flags.StringVar(&f.form, "form", event.VLLM032.String(), "encode as this `release` of vLLM does, such as vllm-0.18")
	flags.StringVar(&f.framing, "framing", "auto",
		"`kind` of replayed messages: topic, no-topic, or auto for that of the --form's release")
	flags.Uint64Var(&f.config.FirstSeq, "first-seq", 0, "`number` of the first batch")
	flags.IntVar(&f.config.BufferSteps, "buffer-steps", 10000, "`batches` that can be replayed")
	flags.IntVar(&f.config.ReplayHWM, "replay-hwm", 1000, "`messages` queued for a peer that asked for a replay; "+
		"further ones are lost (negative: no limit)")
	flags.IntVar(&f.config.Blocks, "blocks", 1024, "`number` of blocks in the cache")
	flags.IntVar(&f.config.BlockSize, "block-size", 16, "`tokens` per block")
	flags.Uint64Var(&f.config.Seed, "seed", 1, "`seed` of the requests that are made up")
	flags.Float64Var(&f.rate, "rate", 0,
		"`N` scheduler steps, or messages of --play, per second (default 10, or at once)")
	flags.DurationVar(&f.duration, "duration", 0, "end after this `time`")
	flags.StringArrayVar(&f.faults, "fault", nil, "misbehave once: a `FAULT` as above; can be given repeatedly")
	flags.Float64Var(&f.faultsRate, "faults-rate", 0,
		"misbehave at random, with this `probability` at each step, for a day")
	flags.Uint64Var(&f.faultsSeed, "faults-seed", 1, "`seed` of --faults-rate")
	flags.StringVar(&f.play, "play", "", "publish the messages of this recording (`FILE` or -)")
	flags.Float64Var(&f.speed, "speed", 0, "with --play: `N` times the pace of the engine that was recorded")
	flags.BoolVar(&f.wait, "wait-subscriber", false, "begin when somebody has subscribed")
	flags.BoolVar(&f.exit, "exit", false, "with --play: end when all is published")
	complete(cmd, "fault", faultStarts()...)
	complete(cmd, "form", formNames()...)
	complete(cmd, "framing", "auto", "topic", "no-topic")
	return cmd
}

// formNames returns the names that event.ParseForm takes.
func formNames() []string {
	var names []string
	for f := event.VLLM090; f <= event.VLLM032; f++ {
		names = append(names, f.String())
	}
	return names
}

// formOf returns the form that a release of vLLM encodes in: that of the latest release not after it which changed
// something.
func formOf(release string) (event.Form, error) {
	wanted, err := numbersOf(release)
	if err != nil {
		return 0, usagef("--form must be a release of vLLM from 0.9.0 on, such as vllm-0.18, not %q", release)
	}
	var form event.Form
	for f := event.VLLM090; f <= event.VLLM032; f++ {
		since, err := numbersOf(f.String())
		if err != nil {
			return 0, err
		}
		if slices.Compare(since, wanted) <= 0 {
			form = f
		}
	}
	if form == 0 {
		return 0, usagef("--form: vLLM publishes events from 0.9.0 on, not yet in %s", release)
	}
	return form, nil
}

// numbersOf returns the three numbers of a release such as vllm-0.10.2 or 0.14.
func numbersOf(release string) ([]uint64, error) {
	parts := strings.Split(strings.TrimPrefix(strings.TrimPrefix(release, "vllm-"), "v"), ".")
	if len(parts) > 3 {
		return nil, strconv.ErrSyntax
	}
	numbers := make([]uint64, 3)
	for i, part := range parts {
		n, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return nil, err
		}
		numbers[i] = n
	}
	return numbers, nil
}

// check reads the flags.
func (f *simFlags) check(cmd *cobra.Command) (err error) {
	if f.play == "" && (f.exit || cmd.Flags().Changed("speed")) {
		return usagef("--exit and --speed need --play")
	}
	changed := cmd.Flags().Changed
	switch {
	case changed("rate") && changed("speed"):
		return usagef("--rate and --speed exclude each other")
	case changed("replay") && f.config.NoReplay:
		return usagef("--replay and --no-replay exclude each other")
	case f.duration < 0:
		return usagef("--duration must not be negative: %v", f.duration)
	case changed("rate") && !(f.rate > 0 && f.rate <= 1e6):
		return usagef("--rate must be above 0 and at most 1000000, not %v", f.rate)
	case changed("speed") && !(f.speed > 0 && f.speed <= 1e9):
		return usagef("--speed must be above 0, not %v", f.speed)
	case f.config.Blocks < 1 || f.config.BlockSize < 1:
		return usagef("--blocks and --block-size must be above 0")
	}
	if f.config.PubEndpoint, err = fullEndpoint("--pub", f.pub); err != nil {
		return err
	}
	if f.config.ReplayEndpoint, err = fullEndpoint("--replay", f.replay); err != nil {
		return err
	}
	if f.config.Form, err = formOf(f.form); err != nil {
		return err
	}
	framing, ok := framings[f.framing]
	if !ok {
		return usagef("--framing must be auto, topic or no-topic, not %q", f.framing)
	}
	f.config.Framing = framing
	f.config.RequestsPerSecond = f.rate
	if err := f.checkFaults(changed); err != nil {
		return err
	}
	f.config.Quiet = f.play != ""
	// A zero would be taken for the default.
	if f.config.BufferSteps == 0 {
		f.config.BufferSteps = -1
	}
	return nil
}

// faultWords says what each kind of fault does, in a few words.
var faultWords = map[enginesim.FaultKind]string{
	enginesim.FaultKill:           "the process dies; with a DURATION it starts again, as by restart",
	enginesim.FaultRestart:        "a new process; N batches are published before its sockets open",
	enginesim.FaultStop:           "the process stands still for DURATION (1s)",
	enginesim.FaultHalfOpen:       "present connections go dead without a word",
	enginesim.FaultPartition:      "connections break and are refused for DURATION (1s)",
	enginesim.FaultDropLive:       "the next N batches do not reach subscribers",
	enginesim.FaultDropReplay:     "the next replay loses N batches in its middle",
	enginesim.FaultCutReplay:      "the next replay loses its last N batches and its end",
	enginesim.FaultLoseEnd:        "the next N replays lose their end marker",
	enginesim.FaultBurn:           "N numbers are skipped",
	enginesim.FaultRoll:           "the replay buffer keeps its newest N batches only",
	enginesim.FaultSlowReplay:     "the next replay pauses for DURATION (100ms) between batches",
	enginesim.FaultEndlessReplay:  "the next replay repeats itself for ever, a batch each DURATION (10ms)",
	enginesim.FaultMuteReplay:     "the next N replays are not answered",
	enginesim.FaultNonsenseReplay: "the next N replays are answered with nonsense",
	enginesim.FaultTwoFrames:      "the next N batches are sent without a topic frame",
	enginesim.FaultWrongLength:    "N extra messages have a number of the wrong length",
	enginesim.FaultUnknownEvent:   "the next N batches carry an event of an unknown type",
	enginesim.FaultUnreadable:     "N batches are not msgpack",
	enginesim.FaultClear:          "the cache is dropped",
}

func faultHelp() string {
	var b strings.Builder
	for _, k := range enginesim.FaultKinds() {
		fmt.Fprintf(&b, "  %-16s %s\n", k, faultWords[k])
	}
	b.WriteString("\nN is 1 where it is left out, but none for restart and kill.")
	return b.String()
}

func faultStarts() []string {
	var list []string
	for _, k := range enginesim.FaultKinds() {
		list = append(list, k.String()+"@\t"+faultWords[k])
	}
	return list
}

// checkFaults makes a script of the faults that were asked for.
func (f *simFlags) checkFaults(changed func(flag string) bool) error {
	random := changed("faults-rate")
	switch {
	case f.play != "" && (len(f.faults) > 0 || random):
		return usagef("--fault and --faults-rate are for an engine of its own, not for --play")
	case changed("faults-seed") && !random:
		return usagef("--faults-seed needs --faults-rate")
	case random && !(f.faultsRate >= 0 && f.faultsRate <= 1):
		return usagef("--faults-rate must be between 0 and 1, not %v", f.faultsRate)
	}
	var script enginesim.Script
	for _, text := range f.faults {
		fault, err := parseFault(text)
		if err != nil {
			return usagef("--fault %s: %v", text, err)
		}
		script = append(script, fault)
	}
	if random {
		rate := f.rate
		if rate == 0 {
			rate = 10 // the engine's own
		}
		// A bound for the sake of memory: at a million steps a second a day is long.
		steps := int(min(rate*(24*time.Hour).Seconds(), 10e6))
		script = append(script, enginesim.RandomScript(f.faultsSeed, steps, f.faultsRate)...)
	}
	f.config.Faults = script
	return nil
}

// parseFault reads KIND[:N][:DURATION]@STEP.
func parseFault(text string) (f enginesim.ScriptedFault, err error) {
	if f, err = readFault(text); err != nil {
		return f, err
	}
	takes := doses[f.Fault.Kind]
	switch {
	case f.Fault.N != 0 && !takes.n:
		return f, fmt.Errorf("%s takes no N", f.Fault.Kind)
	case f.Fault.For != 0 && !takes.duration:
		return f, fmt.Errorf("%s takes no DURATION", f.Fault.Kind)
	}
	return f, nil
}

// doses says what a kind of fault takes; those that are not listed take N alone.
var doses = func() map[enginesim.FaultKind]struct{ n, duration bool } {
	m := map[enginesim.FaultKind]struct{ n, duration bool }{}
	for _, kind := range enginesim.FaultKinds() {
		m[kind] = struct{ n, duration bool }{n: true}
	}
	for _, kind := range []enginesim.FaultKind{
		enginesim.FaultStop, enginesim.FaultPartition, enginesim.FaultSlowReplay, enginesim.FaultEndlessReplay,
	} {
		m[kind] = struct{ n, duration bool }{duration: true}
	}
	m[enginesim.FaultKill] = struct{ n, duration bool }{true, true}
	m[enginesim.FaultHalfOpen] = struct{ n, duration bool }{}
	m[enginesim.FaultClear] = struct{ n, duration bool }{}
	return m
}()

func readFault(text string) (f enginesim.ScriptedFault, err error) {
	what, step, found := strings.Cut(text, "@")
	if !found {
		return f, errors.New("no step; want KIND[:N][:DURATION]@STEP")
	}
	n, err := strconv.ParseUint(step, 10, 31)
	if err != nil {
		return f, fmt.Errorf("%q is not the number of a step", step)
	}
	f.Step = int(n)
	kind, dose, _ := strings.Cut(what, ":")
	if f.Fault.Kind, err = enginesim.ParseFaultKind(kind); err != nil {
		return f, fmt.Errorf("unknown kind %q; kvtap sim --help lists them", kind)
	}
	if dose == "" {
		return f, nil
	}
	first, second, both := strings.Cut(dose, ":")
	if n, err := strconv.ParseUint(first, 10, 20); err == nil {
		f.Fault.N = int(n)
		if !both {
			return f, nil
		}
		first, both = second, false
	}
	if f.Fault.For, err = time.ParseDuration(first); err != nil || f.Fault.For < 0 || both {
		return f, fmt.Errorf("%q is neither N nor DURATION nor N:DURATION, such as 3:2s", dose)
	}
	return f, nil
}

func (a *app) sim(ctx context.Context, f *simFlags) error {
	// Nobody should be told of an engine that has nothing to play. Standard input may have nothing yet: it has to wait.
	var in *input
	if f.play != "" && f.play != "-" {
		var err error
		if in, err = a.open(ctx, f.play); err != nil {
			return err
		}
		defer in.close()
	}
	engine, err := begin(ctx, f.config)
	if err != nil {
		return err
	}
	defer func() { _ = engine.Close() }() // another one after a restart
	// Should the engine restart, it has to be found where it was.
	pub, replay := engine.Endpoints()
	f.config.PubEndpoint = pub
	if replay != "" {
		f.config.ReplayEndpoint = replay
	}
	if err := a.announce(f, pub, replay); err != nil {
		return err
	}
	if f.wait {
		if err := engine.WaitSubscribers(ctx, 1); err != nil {
			return err
		}
	}
	if f.play == "" {
		if err := a.serve(ctx, engine, &f.config); err != nil {
			return err
		}
		return context.Cause(ctx)
	}
	if in == nil {
		if in, err = a.open(ctx, f.play); err != nil {
			return err
		}
		defer in.close()
	}
	p := player{app: a, flags: f, engine: engine}
	err = p.play(ctx, in)
	engine = p.engine
	if err != nil {
		return err
	}
	if f.exit {
		err = pause(ctx, linger)
	} else {
		<-ctx.Done()
		err = context.Cause(ctx)
	}
	if p.failed && (err == nil || errors.Is(err, errDone)) {
		return errReported
	}
	return err
}

// serve lets an engine run until ctx ends, and says so if no request fits into its cache.
func (a *app) serve(ctx context.Context, engine *enginesim.Engine, config *enginesim.Config) error {
	ended := make(chan error, 1)
	go func() { ended <- engine.Run(ctx) }()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for known := false; ; {
		var err error
		running := true
		select {
		case err = <-ended:
			running = false
		case <-ticker.C:
		}
		if s := engine.Stats(); !known && s.Requests+s.Rejected > 0 {
			known = true
			ticker.Stop()
			// As long as none was accepted none waits, so these cannot have found the queue full.
			if s.Requests == 0 {
				a.log.Warn("no request fits into the cache so far, so there is nothing to publish; raise --blocks",
					"blocks", config.Blocks, "block_size", config.BlockSize, "rejected", s.Rejected)
			}
		}
		if !running {
			return err
		}
	}
}

// begin starts a simulated engine.
func begin(ctx context.Context, config enginesim.Config) (*enginesim.Engine, error) {
	engine, err := enginesim.New(config)
	if err != nil {
		return nil, err
	}
	if err := engine.Start(ctx); err != nil {
		return nil, err
	}
	return engine, nil
}

// announce says where the engine is.
func (a *app) announce(f *simFlags, pub, replay string) error {
	var line []byte
	if a.wantsJSON(false) {
		line = append(line, `{"kind":"endpoints","pub":`...)
		line = render.AppendString(line, pub)
		line = append(line, `,"replay":`...)
		if replay == "" {
			line = append(line, "null"...)
		} else {
			line = render.AppendString(line, replay)
		}
		line = append(line, "}\n"...)
	} else {
		how, watch := "publishing at", "kvtap tail "+reachable(pub)
		if f.config.Connect {
			how, watch = "connecting out to", "kvtap tail --listen "+reachable(pub)
		}
		line = fmt.Appendf(line, "%s %s", how, pub)
		if replay != "" {
			line = fmt.Appendf(line, ", replay at %s", replay)
			watch += " --replay " + reachable(replay)
		}
		line = fmt.Appendf(line, "\nwatch it with: %s\n", watch)
	}
	_, err := a.stdout.Write(line)
	return err
}

// reachable returns the shortest form of an endpoint that can be connected to from this machine.
func reachable(endpoint string) string {
	short := strings.TrimPrefix(endpoint, "tcp://")
	for _, wildcard := range []string{"*:", "0.0.0.0:", "[::]:"} {
		if port, ok := strings.CutPrefix(short, wildcard); ok {
			return "127.0.0.1:" + port
		}
	}
	return short
}

// linger is how long an engine stays up for subscribers to take its last messages.
const linger = time.Second

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// player publishes a recording.
type player struct {
	app    *app
	flags  *simFlags
	engine *enginesim.Engine
	failed bool // a line could not be read

	batch   event.Batch
	begun   bool
	last    uint64
	batches uint64
	due     time.Time
	clock   float64 // the recorded engine's at due, in seconds
	clocked bool
}

func (p *player) play(ctx context.Context, in *input) error {
	bad := func(line *recording.LineError) {
		p.failed = true
		p.app.complain("%s: %v", in.name, line)
	}
	err := in.each(bad, func(rec *recording.Record) error {
		if !rec.HasSeq {
			bad(&recording.LineError{Line: in.Line(), Err: errUnnumbered})
			return nil
		}
		return p.publish(ctx, rec)
	})
	if err != nil {
		return err
	}
	if p.app.wantsJSON(false) {
		_, err = fmt.Fprintf(p.app.stdout, "{\"kind\":\"played\",\"batches\":%d}\n", p.batches)
	} else {
		_, err = fmt.Fprintf(p.app.stdout, "played %d batches\n", p.batches)
	}
	return err
}

var errUnnumbered = errors.New("it has no sequence number, which an engine needs; write `SEQ HEX`")

func (p *player) publish(ctx context.Context, rec *recording.Record) error {
	if err := p.keepPace(ctx, rec); err != nil {
		return err
	}
	if p.begun && rec.Seq <= p.last {
		if err := p.restart(ctx); err != nil {
			return err
		}
	}
	p.begun, p.last = true, rec.Seq
	p.batches++
	return p.engine.PublishAt(rec.Seq, rec.Payload)
}

// keepPace waits until it is time to publish rec.
func (p *player) keepPace(ctx context.Context, rec *recording.Record) error {
	switch {
	case p.flags.rate > 0 && p.begun:
		p.due = p.due.Add(time.Duration(float64(time.Second) / p.flags.rate))
	case p.flags.speed > 0:
		at, ok := p.recordedAt(rec)
		if ok && p.clocked && at > p.clock {
			// A clock that jumped by centuries is not waited for.
			p.due = p.due.Add(time.Duration(min((at-p.clock)/p.flags.speed, 1e9) * float64(time.Second)))
		}
		if ok {
			p.clock, p.clocked = at, true
		}
	default:
		p.due = time.Now()
	}
	if p.due.IsZero() {
		p.due = time.Now()
	}
	return pause(ctx, time.Until(p.due))
}

// recordedAt returns when a message was sent, in seconds, by the engine's clock or else by the recorder's.
func (p *player) recordedAt(rec *recording.Record) (at float64, ok bool) {
	if p.batch.Decode(rec.Payload) == nil && p.batch.Time.OK {
		return p.batch.Time.V, true
	}
	return float64(rec.ReceivedAt.UnixMicro()) / 1e6, !rec.ReceivedAt.IsZero()
}

// restart does what the recorded engine did where its numbers go back: another process takes its place.
func (p *player) restart(ctx context.Context) error {
	p.app.log.Info("the recorded engine restarted", "after_seq", p.last)
	if err := pause(ctx, linger); err != nil {
		return err
	}
	if err := p.engine.Close(); err != nil {
		return err
	}
	engine, err := begin(ctx, p.flags.config)
	if err != nil {
		return err
	}
	p.engine = engine
	if p.flags.wait {
		err = engine.WaitSubscribers(ctx, 1)
	}
	p.due = time.Now()
	return err
}
