// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvtap_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A gateway that imports kvtap gets every requirement of this module, and the higher version of each wins there. So the
// packages of the root stay light, and none of them may need a C compiler.
func TestRootPackagesStayLight(t *testing.T) {
	t.Parallel()
	command := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Standard,CgoFiles", "./...")
	command.Env = append(os.Environ(), "CGO_ENABLED=1") // with it off, cgo packages hide their cgo files
	out, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %s", exit.Stderr)
		}
		t.Fatal(err)
	}
	forbidden := map[string]string{
		"k8s.io/":                     "Kubernetes clients belong to cmd/kvtap",
		"google.golang.org/grpc":      "RPC belongs to cmd/kvtap",
		"connectrpc.com/":             "RPC belongs to cmd/kvtap",
		"github.com/spf13/":           "command lines belong to cmd/kvtap",
		"github.com/fxamacker/cbor":   "CBOR belongs to the package that reproduces engine hashes",
		"github.com/pebbe/":           "libzmq belongs to measurements",
		"github.com/go-zeromq/":       "other ZeroMQ clients belong to measurements",
		"github.com/vmihailenco/":     "other MessagePack libraries belong to measurements",
		"github.com/kvtap/kvtap/cmd/": "imports point from the program to the library",
	}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Standard   bool
			CgoFiles   []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for prefix, why := range forbidden {
			if strings.HasPrefix(p.ImportPath, prefix) {
				t.Errorf("the root module imports %s: %s", p.ImportPath, why)
			}
		}
		if !p.Standard && len(p.CgoFiles) > 0 {
			t.Errorf("%s needs cgo: a static binary and cross-compiling would be lost", p.ImportPath)
		}
	}
}

// The rooms of the house (DESIGN.md): what each package may import of ours.
func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	t.Parallel()
	const root = "github.com/kvtap/kvtap/"
	may := map[string][]string{
		"event":               {},
		"internal/zmtp":       {},
		"internal/memnet":     {},
		"internal/interop":    {},
		"internal/leak":       {},
		"internal/simulation": {},
		"e2e":                 {},
		"kvcache":             {"event", "internal/zmtp"},
		"enginesim":           {"event", "internal/zmtp"},
	}
	const format = `{{.ImportPath}} {{join .Imports " "}}`
	out, err := exec.CommandContext(t.Context(), "go", "list", "-f", format, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		room := strings.TrimPrefix(fields[0], root)
		allowed, known := may[room]
		if !known && fields[0] != strings.TrimSuffix(root, "/") {
			t.Errorf("package %s has no place in the house: give it one in DESIGN.md and here", room)
		}
		for _, path := range fields[1:] {
			ours, ok := strings.CutPrefix(path, root)
			if ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which lies to its right", room, ours)
			}
		}
	}
}

var markdownLink = regexp.MustCompile(`\]\(([^)\s#]+)(#[^)\s]*)?\)`)

// Links of the documentation lead somewhere.
func TestDocumentationLinksResolve(t *testing.T) {
	t.Parallel()
	links := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".md" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range markdownLink.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), filepath.FromSlash(m[1]))); err != nil {
				t.Errorf("%s: the link to %s leads nowhere", path, m[1])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links == 0 {
		t.Error("no links found: this test looks in the wrong place")
	}
}

// Tests wait for what they wait for. Where they sleep it is in a synctest bubble, whose clock costs no time; a
// benchmark may, before it measures.
func TestTestsSleepOnlyInBubbles(t *testing.T) {
	t.Parallel()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") || path == "house_test.go" ||
			filepath.Base(path) == "bench_test.go" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		// Bubbles may be opened by a helper in another file of the package.
		bubble, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*_test.go"))
		if err != nil {
			return err
		}
		inBubbles := slices.ContainsFunc(bubble, func(file string) bool {
			other, err := os.ReadFile(file)
			return err == nil && strings.Contains(string(other), `"testing/synctest"`)
		})
		if strings.Contains(string(text), "time.Sleep(") && !inBubbles {
			t.Errorf("%s sleeps outside a synctest bubble", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Every source file says whose it is.
func TestFilesCarryTheLicence(t *testing.T) {
	t.Parallel()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		head := strings.ReplaceAll(string(text[:min(len(text), 200)]), "\r\n", "\n")
		if !strings.Contains(head, "// Copyright 2026 The kvtap Authors\n// SPDX-License-Identifier: Apache-2.0\n") {
			t.Errorf("%s lacks the copyright lines", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
