// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

// errReported ends a command as failed when everything that went wrong has been said already.
var errReported = errors.New("reported")

// usageError is a mistake in how a command was called.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// app is one run of the program: its streams and its global flags.
type app struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer // safe for concurrent use

	output   string // "", "text" or "json"; "" leaves it to the command
	json     bool
	logLevel slog.LevelVar
	logFlag  string
	logStyle string
	// logAsked says that the log level was the user's choice.
	logAsked bool
	log      *slog.Logger

	// begun says that the arguments were understood and a command began.
	begun bool
}

// run runs the program and returns its exit code. It ends soon after ctx does.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: &lockedWriter{out: stderr}}
	root := a.command()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(a.stderr)
	checkTopics(root)
	cmd, err := root.ExecuteContextC(ctx)
	usage := (*usageError)(nil)
	switch {
	case err == nil:
		return exitDone
	case readerGone(err):
		// As with `| head`: whoever asked for the output has enough of it.
		return exitDone
	case ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx))):
		return exitInterrupted
	case errors.Is(err, errReported):
		return exitFailed
	case errors.As(err, &usage), !a.begun:
		fmt.Fprintf(a.stderr, "kvtap: %v\nRun '%s --help' for help.\n", err, cmd.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(a.stderr, "kvtap: %v\n", err)
	return exitFailed
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "kvtap",
		Short: "Watch the KV cache of LLM inference engines",
		Long: `kvtap shows which KV-cache blocks LLM inference engines store and remove, from the events that vLLM,
SGLang, TensorRT-LLM and others publish over ZeroMQ.

Without an engine at hand, begin with "kvtap demo".

Results go to stdout, everything else to stderr. NO_COLOR turns colours off. The exit status is 0 if all went well, 1 if
something failed or could not be read, 2 for a mistake in the call and 130 after an interruption.`,
		Example: `  kvtap demo                                            # a simulated engine and its events, no set-up
  kvtap tail 10.0.0.7:5557 --replay 10.0.0.7:5558       # events of an engine as they happen
  kvtap record 10.0.0.7:5557 run.jsonl.gz --count 1000  # keep them
  kvtap fold run.jsonl.gz                               # what the engine held in the end`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return a.begin(cmd)
		},
	}
	root.SetVersionTemplate(versionTemplate)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	flags := root.PersistentFlags()
	flags.StringVarP(&a.output, "output", "o", "", "output `format`: text or json (default depends on the command)")
	flags.BoolVar(&a.json, "json", false, "short for --output json")
	flags.StringVar(&a.logFlag, "log-level", "info", "least `level` of messages on stderr: debug, info, warn or error")
	flags.StringVar(&a.logStyle, "log-format", "text", "`format` of messages on stderr: text or json")
	complete(root, "output", "text", "json")
	complete(root, "log-level", "debug", "info", "warn", "error")
	complete(root, "log-format", "text", "json")

	root.AddCommand(a.tailCommand(), a.recordCommand(), a.decodeCommand(), a.foldCommand(), a.simCommand(),
		a.demoCommand())
	return root
}

// versionTemplate is evaluated when the flags are read but not yet checked. A version is plain ASCII, whose quoted form
// is the same in Go and in JSON.
const versionTemplate = `{{if or (eq (.Flag "json").Value.String "true") (eq (.Flag "output").Value.String "json") -}}
{"version":{{printf "%q" .Version}}}
{{else -}}
{{.Name}} {{.Version}}
{{end}}`

// checkTopics makes the commands that cobra adds refuse what they do not know. The streams of root must be set already,
// because the commands keep them.
func checkTopics(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "help":
			cmd.Args = func(_ *cobra.Command, args []string) error {
				topic, rest, err := root.Find(args)
				switch {
				case err != nil:
					return &usageError{err}
				case len(rest) > 0:
					return usagef("there is no help about %q of %q", rest[0], topic.CommandPath())
				}
				return nil
			}
		case "completion":
			var shells []string
			for _, shell := range cmd.Commands() {
				shells = append(shells, shell.Name())
			}
			cmd.Args = func(_ *cobra.Command, args []string) error {
				if len(args) > 0 {
					return usagef("unknown shell %q: want one of %s", args[0], strings.Join(shells, ", "))
				}
				return nil
			}
			// Without a function of its own a command shows its help before its arguments are checked.
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			cmd.DisableFlagsInUseLine = true
		}
	}
}

// flagError puts what is wrong with a flag's value in words of its users.
func flagError(err error) error {
	invalid := (*pflag.InvalidValueError)(nil)
	if !errors.As(err, &invalid) {
		return &usageError{err}
	}
	value := invalid.GetValue()
	fault := "is not a number"
	_, notNumber := strconv.ParseFloat(value, 64)
	switch kind := invalid.GetFlag().Value.Type(); {
	case kind == "duration":
		fault = "is not a duration such as 30s or 1h30m"
	case kind == "bool":
		fault = "is neither true nor false"
	case errors.Is(err, strconv.ErrRange):
		fault = "is out of range"
	case notNumber != nil:
	case strings.HasPrefix(kind, "uint"):
		fault = "is not a whole number from 0 on"
	case strings.HasPrefix(kind, "int"):
		fault = "is not a whole number"
	}
	return usagef("--%s: %.64q %s", invalid.GetFlag().Name, value, fault)
}

// begin reads the global flags, once cobra has read the command's own.
func (a *app) begin(cmd *cobra.Command) error {
	switch a.output {
	case "", "text", "json":
	default:
		return usagef("--output must be text or json, not %q", a.output)
	}
	if a.json {
		if a.output == "text" {
			return usagef("--output text and --json exclude each other")
		}
		a.output = "json"
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(a.logFlag)); err != nil {
		return usagef("--log-level must be debug, info, warn or error, not %q", a.logFlag)
	}
	a.logLevel.Set(level)
	a.logAsked = cmd.Flags().Changed("log-level")
	options := &slog.HandlerOptions{Level: &a.logLevel}
	switch a.logStyle {
	case "text":
		a.log = slog.New(slog.NewTextHandler(a.stderr, options))
	case "json":
		a.log = slog.New(slog.NewJSONHandler(a.stderr, options))
	default:
		return usagef("--log-format must be text or json, not %q", a.logStyle)
	}
	a.begun = true
	return nil
}

// wantsJSON reports whether the output is to be JSON, given what the command does of its own accord.
func (a *app) wantsJSON(byDefault bool) bool {
	if a.output == "" {
		return byDefault
	}
	return a.output == "json"
}

// complain reports what is wrong with one line of input, or the like, and lets the command go on.
func (a *app) complain(format string, args ...any) {
	fmt.Fprintf(a.stderr, "kvtap: "+format+"\n", args...)
}

// complete offers a flag's values to the shell.
func complete(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag does not exist
	}
}

// version says which build this is.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return describeBuild(info)
}

func describeBuild(info *debug.BuildInfo) string {
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	about := []string{info.GoVersion, runtime.GOOS + "/" + runtime.GOARCH}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			about = append(about, "revision "+s.Value[:min(len(s.Value), 12)])
		}
		if s.Key == "vcs.modified" && s.Value == "true" {
			about = append(about, "modified")
		}
	}
	return v + " (" + strings.Join(about, ", ") + ")"
}

// exactly returns a check that a command was given these arguments, neither fewer nor more.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("%s is missing", names[len(args)])
		case len(args) > len(names):
			return usagef("unexpected argument %q", args[len(names)])
		}
		// A shell makes an empty argument of a variable that is not set.
		if i := slices.Index(args, ""); i >= 0 {
			return usagef("no %s given: want %s", names[i], wanted[names[i]])
		}
		return nil
	}
}

// wanted says what arguments look like.
var wanted = map[string]string{
	"ENDPOINT": "HOST:PORT, tcp://HOST:PORT or ipc:///PATH",
	"FILE":     "the path of a recording, or -",
}
