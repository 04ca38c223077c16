// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
)

func TestFaultsAreReadFromTheirFlag(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]enginesim.ScriptedFault{
		"clear@0":           {Fault: enginesim.Fault{Kind: enginesim.FaultClear}},
		"burn:3@17":         {Step: 17, Fault: enginesim.Fault{Kind: enginesim.FaultBurn, N: 3}},
		"kill:2s@200":       {Step: 200, Fault: enginesim.Fault{Kind: enginesim.FaultKill, For: 2 * time.Second}},
		"kill:20:1m30s@200": {Step: 200, Fault: enginesim.Fault{Kind: enginesim.FaultKill, N: 20, For: 90 * time.Second}},
		"slow_replay:0@1":   {Step: 1, Fault: enginesim.Fault{Kind: enginesim.FaultSlowReplay}},
	} {
		got, err := parseFault(text)
		if err != nil || got != want {
			t.Errorf("%s is read as %+v, %v", text, got, err)
		}
	}
	for args, want := range map[string]string{
		"--fault kill":                       "no step",
		"--fault kill@":                      "not the number of a step",
		"--fault kill@-1":                    "not the number of a step",
		"--fault kill@9999999999":            "not the number of a step",
		"--fault @1":                         `unknown kind ""`,
		"--fault explode@1":                  `unknown kind "explode"`,
		"--fault kill:x@1":                   `"x" is neither`,
		"--fault kill:-1@1":                  `"-1" is neither`,
		"--fault kill:-1s@1":                 `"-1s" is neither`,
		"--fault kill:1:2@1":                 `"1:2" is neither`,
		"--fault kill:1s:2@1":                `"1s:2" is neither`,
		"--fault kill:1:2s:3@1":              `"1:2s:3" is neither`,
		"--fault kill:9999999@1":             `"9999999" is neither`,
		"--fault stop:3@1":                   "stop takes no N",
		"--fault clear:5@1":                  "clear takes no N",
		"--fault half_open:3s@1":             "half_open takes no DURATION",
		"--fault burn:2:1s@1":                "burn takes no DURATION",
		"--faults-rate 2":                    "between 0 and 1",
		"--faults-rate=-1":                   "between 0 and 1",
		"--faults-rate NaN":                  "between 0 and 1",
		"--faults-seed 3":                    "needs --faults-rate",
		"--play x --fault kill@1":            "not for --play",
		"--play x --faults-rate 0.5":         "not for --play",
		"--fault burn@3 --fault explode:1@1": "explode",
	} {
		got := kvtap(t, "", append([]string{"sim"}, strings.Fields(args)...)...)
		if got.code != exitUsage || !strings.Contains(got.stderr, want) {
			t.Errorf("sim %s: %+v", args, got)
		}
	}
}

func TestHelpNamesEveryKindOfFault(t *testing.T) {
	t.Parallel()
	help := kvtap(t, "", "sim", "--help").stdout
	for _, k := range enginesim.FaultKinds() {
		if faultWords[k] == "" || !strings.Contains(help, k.String()) || !strings.Contains(help, faultWords[k]) {
			t.Errorf("sim --help does not explain %v", k)
		}
	}
	if len(faultWords) != len(enginesim.FaultKinds()) {
		t.Errorf("%d kinds are explained", len(faultWords))
	}
}

func TestRandomFaultsFollowScriptedOnes(t *testing.T) {
	t.Parallel()
	f := simFlags{faults: []string{"burn:2@5"}, faultsSeed: 7, faultsRate: 0.001, rate: 20}
	if err := f.checkFaults(func(string) bool { return true }); err != nil {
		t.Fatal(err)
	}
	want := append(enginesim.Script{{Step: 5, Fault: enginesim.Fault{Kind: enginesim.FaultBurn, N: 2}}},
		enginesim.RandomScript(7, 20*24*60*60, 0.001)...)
	if diff := cmp.Diff(want, f.config.Faults); diff != "" || len(want) < 1000 {
		t.Errorf("%d faults (-want +got):\n%s", len(want), diff)
	}
}

func TestSimInjectsFaults(t *testing.T) {
	t.Parallel()
	engine := start(t, "sim", "--json", "--pub", anywhere, "--replay", anywhere, "--rate", "500", "--log-level", "info",
		"--fault", "burn:3@20", "--fault", "restart:4@60", "--faults-rate", "0")
	engine.endpoints()
	engine.complains("kind=burn n=3")
	engine.complains("kind=restart n=4")
}
