// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/interop"
)

// share is the stream of a serving vLLM 0.32.
const share = streams + "/real-v0.32.0-share.txt.gz"

// decoded returns what decode prints for each message of a stream.
func decoded(t *testing.T, path string) []string {
	t.Helper()
	got := kvtap(t, "", "decode", path)
	if got.code != exitDone {
		t.Fatalf("decode: %+v", got)
	}
	return strings.Split(strings.TrimSuffix(got.stdout, "\n"), "\n")
}

var batchLine = regexp.MustCompile(`^\{"kind":"batch","seq":(\d+),"replayed":(true|false),(.*)$`)

// batches reads JSON lines of tail until n batches came, and returns them as decode prints them. Their numbers must
// rise from first by one. replayed is how many of them came by replay.
func (p *program) batches(first uint64, n int) (lines []string, replayed int) {
	p.t.Helper()
	for len(lines) < n {
		line := p.line()
		m := batchLine.FindStringSubmatch(line)
		if m == nil {
			if !strings.HasPrefix(line, `{"kind":"state",`) && !strings.HasPrefix(line, `{"kind":"reset",`) {
				p.t.Fatalf("unexpected line: %s", line)
			}
			continue
		}
		if want := strconv.FormatUint(first+uint64(len(lines)), 10); m[1] != want {
			p.t.Fatalf("batch %s where %s was due", m[1], want)
		}
		if m[2] == "true" {
			replayed++
		}
		lines = append(lines, "{"+m[3])
	}
	return lines, replayed
}

const anywhere = "tcp://127.0.0.1:0"

// play publishes a recording from a simulated engine on free ports.
func play(t *testing.T, path string, args ...string) (p *program, pub, replay string) {
	t.Helper()
	p = start(t, append([]string{"sim", "--json", "--log-level", "warn", "--play", path, "--pub", anywhere,
		"--replay", anywhere},
		args...)...)
	pub, replay = p.endpoints()
	return p, pub, replay
}

func TestTailShowsWhatWasPublishedBeforeItBegan(t *testing.T) {
	t.Parallel()
	for _, framing := range []string{"topic", "no-topic"} {
		t.Run(framing, func(t *testing.T) {
			t.Parallel()
			engine, pub, replay := play(t, share, "--framing", framing)
			engine.until(`{"kind":"played","batches":128}`)
			tail := start(t, "tail", pub, "--replay", replay, "--json")
			for i, want := range []string{
				`{"kind":"state","state":"connecting","bound":"at_least","reason":"start"}`,
				`{"kind":"reset","reason":"start"}`,
				`{"kind":"state","state":"syncing","bound":"at_least","reason":"start"}`,
			} {
				if got := tail.line(); got != want {
					t.Errorf("line %d is %s, want %s", i+1, got, want)
				}
			}
			got, replayed := tail.batches(0, 128)
			if diff := cmp.Diff(decoded(t, share), got); diff != "" || replayed != 128 {
				t.Errorf("%d replayed (-want +got):\n%s", replayed, diff)
			}
			tail.until(`{"kind":"state","state":"live","bound":"exact","reason":null}`)
			if code := tail.stop(); code != exitInterrupted {
				t.Errorf("an interrupted tail ended with %d", code)
			}
			if tail.stderr.String() != "" {
				t.Errorf("stderr: %s", tail.stderr)
			}
			if code := engine.stop(); code != exitInterrupted {
				t.Errorf("an interrupted sim ended with %d", code)
			}
		})
	}
}

func TestTailShowsLiveBatches(t *testing.T) {
	t.Parallel()
	engine, pub, _ := play(t, share, "--wait-subscriber", "--topic", "kv@pod@m", "--rate", "2000")
	tail := start(t, "tail", strings.TrimPrefix(pub, "tcp://"), "-o", "json", "--topic", "kv@pod", "--model", "m",
		"--pod", "p")
	var got []string
	for len(got) < 128 {
		if line := tail.line(); strings.Contains(line, `"kind":"batch"`) {
			rest, ok := strings.CutPrefix(line,
				fmt.Sprintf(`{"kind":"batch","seq":%d,"replayed":false,"pod":"p","model":"m",`, len(got)))
			if !ok {
				t.Fatalf("batch %d: %s", len(got), line)
			}
			got = append(got, "{"+rest)
		}
	}
	if diff := cmp.Diff(decoded(t, share), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if hints := strings.Count(tail.stderr.String(), "no replay endpoint"); hints != 1 {
		t.Errorf("%d hints about replay: %s", hints, tail.stderr)
	}
	engine.stop()
}

func TestTailListensForAnEngineThatConnectsOut(t *testing.T) {
	t.Parallel()
	// A socket's path has its limits, which a folder named after the test would exceed.
	dir, err := os.MkdirTemp("", "kvtap")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	endpoint := "ipc://" + filepath.ToSlash(filepath.Join(dir, "s"))
	tail := start(t, "tail", endpoint, "--listen", "--json")
	engine := start(t, "sim", "--pub", endpoint, "--connect", "--no-replay", "--wait-subscriber", "--play", share)
	got, replayed := tail.batches(0, 128)
	if diff := cmp.Diff(decoded(t, share), got); diff != "" || replayed != 0 {
		t.Errorf("%d replayed (-want +got):\n%s", replayed, diff)
	}
	if lines := engine.until("watch it"); !strings.Contains(lines[len(lines)-1], "kvtap tail --listen "+endpoint) {
		t.Errorf("sim announces %q", lines)
	}
}

func TestTailTellsOfARestart(t *testing.T) {
	t.Parallel()
	in := filepath.Join(t.TempDir(), "two-lives.txt")
	lives := fmt.Sprintf("0 %s\n1 %s\n2 %s\n0 %s\n1 %s\n", stored(1), stored(2), stored(3), stored(4), stored(5))
	if err := os.WriteFile(in, []byte(lives), 0o666); err != nil {
		t.Fatal(err)
	}
	_, pub, replay := play(t, in, "--wait-subscriber")
	tail := start(t, "tail", pub, "--replay", replay, "--json")
	tail.batches(0, 3)
	tail.until(`{"kind":"reset","reason":"restart"}`)
	got, _ := tail.batches(0, 2)
	for i, hash := range []string{"0000000000000004", "0000000000000005"} {
		if !strings.Contains(got[i], hash) {
			t.Errorf("batch %d after the restart: %s", i, got[i])
		}
	}
}

func TestTailAsTextMarksReplayedEvents(t *testing.T) {
	t.Parallel()
	engine, pub, replay := play(t, share)
	engine.until("played")
	tail := start(t, "tail", pub, "--replay", replay)
	lines := tail.until("-- live, exact")
	events := 0
	for _, line := range lines {
		if strings.Contains(line, "  replay  ") {
			events++
		}
		if strings.Contains(line, "\x1b") {
			t.Fatalf("colours without a terminal: %q", line)
		}
	}
	if !strings.HasPrefix(lines[0], "TIME") || events < 128 {
		t.Errorf("%d replayed events in:\n%s", events, strings.Join(lines, "\n"))
	}
	if code := tail.stop(); code != exitInterrupted {
		t.Errorf("code %d", code)
	}
}

func TestTailSaysWhyItWaits(t *testing.T) {
	t.Parallel()
	tail := start(t, "tail", "127.0.0.1:1", "--json")
	tail.complains("127.0.0.1:1")
	if code := tail.stop(); code != exitInterrupted {
		t.Errorf("code %d", code)
	}
}

func TestTailEndsWithItsReader(t *testing.T) {
	t.Parallel()
	engine, pub, replay := play(t, share)
	engine.until("played")
	for _, c := range []struct {
		err  error
		code int
	}{{io.ErrClosedPipe, exitDone}, {errDiskFull, exitFailed}} {
		var stderr bytes.Buffer
		code := run(t.Context(), []string{"tail", pub, "--replay", replay}, strings.NewReader(""),
			failingWriter{c.err}, &stderr)
		if code != c.code || strings.Contains(stderr.String(), c.err.Error()) != (c.code == exitFailed) {
			t.Errorf("%v: code %d, stderr %q", c.err, code, &stderr)
		}
	}
}

func TestAStuckReaderDoesNotHoldUpAnInterruption(t *testing.T) {
	t.Parallel()
	engine, pub, replay := play(t, share)
	engine.until("played")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &stuckWriter{stuck: make(chan struct{}), free: t.Context().Done()}
	ended := make(chan int)
	go func() {
		ended <- run(ctx, []string{"tail", pub, "--replay", replay}, strings.NewReader(""), out, io.Discard)
	}()
	<-out.stuck
	cancel()
	select {
	case code := <-ended:
		if code != exitInterrupted {
			t.Errorf("code %d", code)
		}
	case <-time.After(patience):
		t.Fatal("the program did not end")
	}
}

// The stream of a serving vLLM, published by real libzmq: half of it before anybody listens, half of it live.
func TestTailOfRealLibzmqShowsEveryBatchOnceInOrder(t *testing.T) {
	t.Parallel()
	for _, framing := range []string{"old", "new"} {
		t.Run(framing+" framing", func(t *testing.T) {
			t.Parallel()
			peer := interop.Start(t, "publish", "--stream", share, "--framing", framing)
			peer.Say("publish", "64")
			peer.Expect("published")
			tail := start(t, "tail", peer.Endpoint("pub"), "--replay", peer.Endpoint("replay"), "--json")
			got, replayed := tail.batches(0, 64)
			if replayed != 64 {
				t.Errorf("%d of the first 64 batches are marked as replayed", replayed)
			}
			tail.until(`"state":"live","bound":"exact","reason":null}`)
			peer.Say("publish", "all")
			peer.Expect("published")
			live, replayed := tail.batches(64, 64)
			if replayed != 0 {
				t.Errorf("%d live batches are marked as replayed", replayed)
			}
			if diff := cmp.Diff(decoded(t, share), append(got, live...)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if code := tail.stop(); code != exitInterrupted {
				t.Errorf("code %d", code)
			}
		})
	}
}

func TestARecordingPlayedBackFoldsToTheSameState(t *testing.T) {
	t.Parallel()
	const stream = streams + "/stream-main-hybrid.txt.gz"
	want := kvtap(t, "", "fold", stream)
	if want.code != exitDone || want.stdout == "" {
		t.Fatalf("%+v", want)
	}
	source := stream
	dir := t.TempDir()
	// The second round plays back what the first one recorded.
	for _, name := range []string{"first.jsonl.gz", "second.jsonl"} {
		engine, pub, replay := play(t, source, "--topic", "kv@pod@m")
		engine.until("played")
		file := filepath.Join(dir, name)
		got := kvtap(t, "", "record", pub, file, "--replay", replay, "--count", "250", "--json")
		if got.code != exitDone {
			t.Fatalf("%+v", got)
		}
		summary := parse(t, got.stdout)
		if summary["messages"] != 250. || summary["first_seq"] != 0. || summary["last_seq"] != 249. ||
			summary["file"] != file {
			t.Errorf("summary %s", got.stdout)
		}
		if folded := kvtap(t, "", "fold", file); folded != want {
			t.Errorf("%s folds to another state: code %d, stderr %q", name, folded.code, folded.stderr)
		}
		source = file
	}
	// And the bytes are those of the engine.
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range slices.Collect(strings.Lines(string(text))) {
		var rec struct {
			At      time.Time `json:"received_at"`
			Topic   string    `json:"topic"`
			Seq     int       `json:"seq"`
			Payload []byte    `json:"payload"`
		}
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Seq != i || rec.Topic != "kv@pod@m" || rec.At.IsZero() {
			t.Fatalf("line %d: %.200s", i+1, line)
		}
		if want := streamMessages(t, stream)[i]; fmt.Sprintf("%x", rec.Payload) != want.hex {
			t.Fatalf("line %d: other bytes", i+1)
		}
	}
}

func TestRecordKeepsWhatCannotBeDecoded(t *testing.T) {
	t.Parallel()
	in := filepath.Join(t.TempDir(), "in.txt")
	if err := os.WriteFile(in, []byte("0 "+stored(1)+"\n1 c1c1\n2 "+stored(2)+"\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	engine, pub, replay := play(t, in)
	engine.until("played")
	got := kvtap(t, "", "record", pub, "-", "--replay", replay, "--count", "3", "--log-level", "error")
	if got.code != exitDone || !strings.Contains(got.stdout, `"seq":1,"payload":"wcE="}`) ||
		strings.Count(got.stdout, "\n") != 3 {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(got.stderr, "recorded 3 messages") {
		t.Errorf("stderr %q", got.stderr)
	}
}

func TestAnInterruptedRecordingIsComplete(t *testing.T) {
	t.Parallel()
	engine, pub, replay := play(t, share)
	engine.until("played")
	file := filepath.Join(t.TempDir(), "run.jsonl.gz")
	record := start(t, "record", pub, file, "--replay", replay)
	// Once the state is live, everything replayed was recorded.
	record.complains("state=live")
	if code := record.stop(); code != exitInterrupted {
		t.Errorf("code %d", code)
	}
	if !strings.Contains(record.stderr.String(), "recorded 128 messages") {
		t.Errorf("stderr %s", record.stderr)
	}
	if got, want := kvtap(t, "", "fold", file), kvtap(t, "", "fold", share); got != want {
		t.Errorf("code %d, stderr %q", got.code, got.stderr)
	}

	again := kvtap(t, "", "record", pub, file, "--replay", replay, "--count", "1")
	if again.code != exitFailed || !strings.Contains(again.stderr, "--force") {
		t.Errorf("an existing file: %+v", again)
	}
	again = kvtap(t, "", "record", pub, file, "--replay", replay, "--count", "1", "--force")
	if again.code != exitDone {
		t.Errorf("--force: %+v", again)
	}
	if got := kvtap(t, "", "decode", file); strings.Count(got.stdout, "\n") != 1 {
		t.Errorf("after --force: %+v", got)
	}
}

func TestRecordEndsAfterItsDuration(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "run.jsonl")
	got := kvtap(t, "", "record", "127.0.0.1:1", file, "--duration", "1ms", "--json", "--log-level", "error")
	if got.code != exitDone || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	summary := parse(t, got.stdout)
	if summary["messages"] != 0. || summary["first_seq"] != nil {
		t.Errorf("summary %s", got.stdout)
	}
}

func TestRecordLeavesNoEmptyFileBehindAFailure(t *testing.T) {
	t.Parallel()
	engine := start(t, "sim", "--json", "--pub", anywhere, "--no-replay")
	pub, replay := engine.endpoints()
	if replay != "" {
		t.Errorf("replay at %q in spite of --no-replay", replay)
	}
	file := filepath.Join(t.TempDir(), "run.jsonl")
	got := kvtap(t, "", "record", pub, file, "--listen") // the port is taken
	if _, err := os.Stat(file); got.code != exitFailed || err == nil {
		t.Errorf("%+v, file: %v", got, err)
	}
	var stderr bytes.Buffer
	code := run(t.Context(), []string{"record", pub, "-", "--count", "1"}, strings.NewReader(""),
		failingWriter{errDiskFull}, &stderr)
	if code != exitFailed || !strings.Contains(stderr.String(), errDiskFull.Error()) {
		t.Errorf("full disk: code %d, stderr %s", code, &stderr)
	}
}

func TestSimServesItsOwnTraffic(t *testing.T) {
	t.Parallel()
	engine := start(t, "sim", "--json", "--pub", anywhere, "--replay", anywhere, "--rate", "500", "--blocks", "64",
		"--form", "vllm-0.23", "--rank", "3", "--first-seq", "1")
	pub, replay := engine.endpoints()
	tail := start(t, "tail", pub, "--replay", replay, "--json")
	lines, _ := tail.batches(1, 50)
	all := strings.Join(lines, "")
	for _, want := range []string{`"data_parallel_rank":3`, `"type":"BlockStored"`, `"type":"BlockRemoved"`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in 50 batches", want)
		}
	}
	if engine.stop(); strings.Contains(engine.stderr.String(), tooSmall) {
		t.Errorf("stderr of an engine that publishes: %s", engine.stderr)
	}
}

func TestSimEndsByItself(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"--duration", "1ms"},
		{"--duration", "1ms", "--wait-subscriber"},
		{"--duration", "1ms", "--play", share},
		{"--play", share, "--exit"},
		{"--play", share, "--speed", "1e9", "--exit", "-o", "text", "--buffer-steps", "0"},
	} {
		args = append([]string{"sim", "--json", "--pub", anywhere, "--replay", anywhere, "--log-level", "warn"},
			args...)
		if slices.Contains(args, "-o") {
			args = slices.DeleteFunc(args, func(s string) bool { return s == "--json" })
		}
		if got := kvtap(t, "", args...); got.code != exitDone || got.stderr != "" {
			t.Errorf("%v: %+v", args, got)
		} else if slices.Contains(args, "--exit") && !strings.Contains(got.stdout, "128") {
			t.Errorf("%v: does not say what was played: %s", args, got.stdout)
		}
	}
}

func TestSimPlaysWhatItCanOfABadRecording(t *testing.T) {
	t.Parallel()
	in := "0 " + stored(1) + "\nzz\n" + stored(2) + "\n3 " + stored(3) + "\n"
	for _, args := range [][]string{{"--exit"}, {"--duration", "100ms"}} {
		got := kvtap(t, in, append([]string{"sim", "--play", "-", "--pub", anywhere, "--replay", anywhere}, args...)...)
		if got.code != exitFailed || !strings.Contains(got.stdout, "played 2 batches") ||
			!strings.Contains(got.stderr, "line 2: ") || !strings.Contains(got.stderr,
			"line 3: it has no sequence number") {
			t.Errorf("%v: %+v", args, got)
		}
	}
	if got := kvtap(t, "", "sim", "--play", "no-such-file", "--pub", anywhere, "--replay",
		anywhere); got.code != exitFailed || got.stdout != "" || !strings.Contains(got.stderr, "no-such-file") {
		t.Errorf("no file: %+v", got)
	}
}

func TestSimSaysThatItsCacheIsTooSmall(t *testing.T) {
	t.Parallel()
	engine := start(t, "sim", "--blocks", "8", "--rate", "100", "--pub", anywhere, "--no-replay")
	engine.complains(tooSmall)
	if code := engine.stop(); code != exitInterrupted {
		t.Errorf("code %d", code)
	}
	if got := engine.stderr.String(); strings.Count(got, tooSmall) != 1 || !strings.Contains(got, "blocks=8 ") {
		t.Errorf("stderr %s", got)
	}
}

// tooSmall is what sim says of a cache that no request fits into.
const tooSmall = "no request fits into the cache"

func TestSimCannotPublishWhereSomebodyElseDoes(t *testing.T) {
	t.Parallel()
	first := start(t, "sim", "--json", "--pub", anywhere, "--no-replay")
	pub, _ := first.endpoints()
	if got := kvtap(t, "", "sim", "--pub", pub, "--no-replay"); got.code != exitFailed ||
		!strings.Contains(got.stderr, "in use") {
		t.Errorf("%+v", got)
	}
}

func TestDemoNeedsNoSetUp(t *testing.T) {
	t.Parallel()
	demo := start(t, "demo", "--rate", "50")
	lines := demo.until("  live    ")
	text := strings.Join(lines, "\n")
	for _, want := range []string{"tcp://127.0.0.1:", "Ctrl-C", "TIME", "  replay  stored ", "-- live, exact"} {
		if !strings.Contains(text, want) {
			t.Errorf("the demo does not show %q:\n%s", want, text)
		}
	}
	if code := demo.stop(); code != exitInterrupted {
		t.Errorf("code %d", code)
	}
	asJSON := start(t, "demo", "--json", "--rate", "500")
	asJSON.batches(0, 30)
	if got := kvtap(t, "", "demo", "--duration", "300ms"); got.code != exitDone || got.stderr != "" {
		t.Errorf("%+v", got)
	}
}

func TestInterruptedWhileReadingStandardInput(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"decode"}, {"fold", "-"}, {"sim", "--play", "-", "--pub", anywhere, "--replay",
		anywhere}} {
		ctx, cancel := context.WithCancel(t.Context())
		silent, keyboard := io.Pipe()
		time.AfterFunc(10*time.Millisecond, cancel)
		var stdout, stderr bytes.Buffer
		if code := run(ctx, args, silent, &stdout, &stderr); code != exitInterrupted ||
			strings.Contains(stderr.String(), "kvtap: ") {
			t.Errorf("%v: code %d, stderr %q", args, code, &stderr)
		}
		_ = keyboard.Close()
	}
}
