// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"os"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/kvtap/kvtap/event"
)

func TestMistakesInTheCallSayWhatToDo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"nonsense", "unknown command"},
		{"tial", "tail"}, // a suggestion
		{"tail", "ENDPOINT is missing"},
		{"tail a:1 b:2", `unexpected argument "b:2"`},
		{"tail 10.0.0.7", "no port"},
		{"tail tcp://*:5557", "--listen"},
		{"tail a:0", "--listen"},
		{"tail udp://a:1", "not supported"},
		{"tail a:1 --replay b", "--replay: "},
		{"tail a:1 --replay a:1", "events and replay are both at"},
		{"tail a:1 --from-seq x", `kvtap: --from-seq: "x" is not a number` + "\n"},
		{"tail a:1 --from-seq=-1", `--from-seq: "-1" is not a whole number from 0 on` + "\n"},
		{"tail a:1 --from-seq 99999999999999999999", `--from-seq: "99999999999999999999" is out of range` + "\n"},
		{"tail a:1 --from-seq", "needs an argument: --from-seq"},
		{"tail a:1 --history-lost maybe", `--history-lost: "maybe" is neither clear nor keep` + "\n"},
		{"record a:1 f --count x", `--count: "x" is not a number` + "\n"},
		{"record a:1 f --duration x", `--duration: "x" is not a duration such as`},
		{"tail a:1 --json=x", `--json: "x" is neither true nor false` + "\n"},
		{"sim --blocks 1.5", `--blocks: "1.5" is not a whole number` + "\n"},
		{"sim --rank x", `--rank: "x" is not a number` + "\n"},
		{"sim --rate x", `--rate: "x" is not a number` + "\n"},
		{"completion foo", `unknown shell "foo": want one of bash, fish, powershell, zsh`},
		{"completion bash foo", "unknown command"},
		{"help foo", `unknown command "foo"`},
		{"help tail foo", `no help about "foo" of "kvtap tail"`},
		{"tail a:1 --unknown", "--unknown"},
		{"tail a:1 -o yaml", "--output must be text or json"},
		{"tail a:1 -o text --json", "output"},
		{"tail a:1 --log-level loud", "--log-level must be"},
		{"tail a:1 --log-format xml", "--log-format must be"},
		{"record a:1", "FILE is missing"},
		{"record a:1 f --duration=-1s", "--duration must not be negative"},
		{"record a b", "no port"},
		{"decode a b", `unexpected argument "b"`},
		{"fold", "FILE is missing"},
		{"sim x", "unexpected argument"},
		{"sim --exit", "need --play"},
		{"sim --speed 2", "need --play"},
		{"sim --play x --speed 0", "--speed must be above 0"},
		{"sim --rate 0", "--rate must be above 0"},
		{"sim --play x --rate 1 --speed 1", "rate"},
		{"sim --duration=-1s", "--duration must not be negative"},
		{"sim --blocks 0", "must be above 0"},
		{"sim --form vllm-0.8", "from 0.9.0 on"},
		{"sim --form sglang", "such as vllm-0.18"},
		{"sim --form 0.1.2.3", "such as vllm-0.18"},
		{"sim --framing both", "--framing must be"},
		{"sim --pub nowhere", "--pub: "},
		{"sim --replay nowhere", "--replay: "},
		{"sim --no-replay --replay a:1", "no-replay"},
		{"demo --duration=-1s", "--duration must not be negative"},
		{"demo --rate 0", "--rate must be above 0"},
	} {
		got := kvtap(t, "", strings.Fields(c.args)...)
		if got.code != exitUsage || got.stdout != "" || !strings.HasPrefix(got.stderr, "kvtap: ") ||
			!strings.Contains(got.stderr, c.want) || !strings.Contains(got.stderr, "--help' for help.") {
			t.Errorf("kvtap %s: %+v", c.args, got)
		}
	}
}

func TestEmptyArgumentsAreMistakes(t *testing.T) {
	t.Parallel()
	const endpoint, file = "kvtap: no ENDPOINT given: want HOST:PORT, ", "kvtap: no FILE given: want "
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"tail", ""}, endpoint},
		{[]string{"record", "", "f"}, endpoint},
		{[]string{"record", "a:1", ""}, file},
		{[]string{"decode", ""}, file},
		{[]string{"fold", ""}, file},
	} {
		if got := kvtap(t, "", c.args...); got.code != exitUsage || got.stdout != "" ||
			!strings.HasPrefix(got.stderr, c.want) {
			t.Errorf("%q: %+v", c.args, got)
		}
	}
}

func TestHelpNamesTheValuesOfFlags(t *testing.T) {
	t.Parallel()
	for command, want := range map[string][]string{
		"demo": {"--rate N ", "--duration time "},
		"sim":  {"--rate N ", "--speed N ", "--play FILE ", "--blocks number "},
		"tail": {"--from-seq number ", "--replay endpoint ", `"pod" and "model"`, "connecting", "stopped"},
		"fold": {"exit status at 0"},
	} {
		got := kvtap(t, "", command, "--help")
		for _, text := range want {
			if !strings.Contains(got.stdout, text) {
				t.Errorf("%s --help does not have %q:\n%s", command, text, got.stdout)
			}
		}
	}
}

func TestHelpWithoutATopic(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"":                       "kvtap [command]",
		"help":                   "kvtap [command]",
		"help completion zsh":    "kvtap completion zsh",
		"completion":             "kvtap completion [command]",
		"completion --help":      "kvtap completion [command]",
		"completion bash --help": "kvtap completion bash",
	} {
		if got := kvtap(t, "", strings.Fields(args)...); got.code != exitDone || got.stderr != "" ||
			!strings.Contains(got.stdout, want) {
			t.Errorf("kvtap %s: %+v", args, got)
		}
	}
}

func TestHelpHasExamples(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"", "tail", "record", "decode", "fold", "sim", "demo"} {
		for _, args := range [][]string{{command, "--help"}, {"help", command}} {
			got := kvtap(t, "", strings.Fields(strings.Join(args, " "))...)
			if got.code != exitDone || got.stderr != "" || !strings.Contains(got.stdout,
				"Examples:\n  kvtap "+command) {
				t.Errorf("%v: %+v", args, got)
			}
			for line := range strings.Lines(got.stdout) {
				if len(line) > 150 {
					t.Errorf("%v: a line of %d characters: %s", args, len(line), line)
				}
			}
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	if got := kvtap(t, "", "--version"); got.code != exitDone || !strings.HasPrefix(got.stdout, "kvtap ") ||
		got.stderr != "" {
		t.Errorf("%+v", got)
	}
	for _, args := range []string{"--version --json", "--json --version", "-o json --version"} {
		got := kvtap(t, "", strings.Fields(args)...)
		if got.code != exitDone || got.stderr != "" || !maps.Equal(parse(t, got.stdout), object{"version": version()}) {
			t.Errorf("%s: %+v", args, got)
		}
	}
	got := describeBuild(&debug.BuildInfo{GoVersion: "go1.26.0", Main: debug.Module{Version: "v1.2.3"},
		Settings: []debug.BuildSetting{
			{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"},
		}})
	if !strings.HasPrefix(got, "v1.2.3 (go1.26.0, ") || !strings.HasSuffix(got, ", revision 0123456789ab, modified)") {
		t.Error(got)
	}
	if got := describeBuild(&debug.BuildInfo{}); !strings.HasPrefix(got, "(devel) (") {
		t.Error(got)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if got := kvtap(t, "", "completion", shell); got.code != exitDone || !strings.Contains(got.stdout, "kvtap") {
			t.Errorf("%s: %+v", shell, got)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"ta"}, "tail\tShow"},
		{[]string{"tail", "-o", ""}, "text\njson\n:4"},
		{[]string{"tail", "--log-level", ""}, "debug\n"},
		{[]string{"sim", "--form", ""}, "vllm-0.32\n"},
		{[]string{"record", "a:1", ""}, ":0"}, // files
		{[]string{"record", ""}, ":4"},        // no files
		{[]string{"tail", "a:1", "--replay", ""}, ":4"},
	} {
		got := kvtap(t, "", append([]string{"__complete"}, c.args...)...)
		if got.code != exitDone || !strings.Contains(got.stdout, c.want) {
			t.Errorf("%q: %+v", c.args, got)
		}
	}
}

func TestLogFormatAndLevel(t *testing.T) {
	t.Parallel()
	tail := start(t, "tail", "127.0.0.1:1", "--log-format", "json")
	tail.complains("connection_failed")
	for line := range strings.Lines(tail.stderr.String()) {
		var entry struct{ Level string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level == "" {
			t.Errorf("%v: %s", err, line)
		}
	}
	quiet := start(t, "tail", "127.0.0.1:1", "--log-level", "error")
	quiet.line()
	quiet.stop()
	if quiet.stderr.String() != "" {
		t.Errorf("stderr: %s", quiet.stderr)
	}
}

func TestStatesAreLoggedOnlyOnRequest(t *testing.T) {
	t.Parallel()
	var a app
	var buf strings.Builder
	a.log = slog.New(slog.NewTextHandler(&buf, nil))
	log := a.clientLog().With("pod", "p").WithGroup("g")
	log.Info("status")
	log.Warn("trouble", "k", "v")
	if got := buf.String(); strings.Contains(got, "status") || !strings.Contains(got, "trouble pod=p g.k=v") {
		t.Error(got)
	}
	a.logAsked = true
	a.clientLog().Info("status")
	if got := buf.String(); !strings.Contains(got, "status") {
		t.Error(got)
	}
}

func TestFormOfARelease(t *testing.T) {
	t.Parallel()
	for release, want := range map[string]event.Form{
		"0.9": event.VLLM090, "vllm-0.9.2": event.VLLM091, "v0.11.0": event.VLLM0102, "vllm-0.16": event.VLLM014,
		"0.18.1": event.VLLM017, "vllm-0.25": event.VLLM024, "1.0": event.VLLM032,
	} {
		if got, err := formOf(release); got != want || err != nil {
			t.Errorf("%s: %v, %v", release, got, err)
		}
	}
}

func TestInterruptedBeforeItBegan(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out strings.Builder
	if code := run(ctx, []string{"decode"}, strings.NewReader(cleared), &out, &out); code != exitInterrupted ||
		out.Len() > 0 {
		t.Errorf("code %d, output %q", code, out.String())
	}
}

func TestNoColourWithoutATerminal(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	for _, w := range []*os.File{f, null} {
		if colourful(&lockedWriter{out: w}) {
			t.Errorf("colours for %s", w.Name())
		}
	}
	t.Setenv("NO_COLOR", "1")
	if colourful(os.Stdout) {
		t.Error("colours in spite of NO_COLOR")
	}
}
