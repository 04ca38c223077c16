// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	blockSize = 32  // tokens; vLLM on a CPU takes no less
	pool      = 160 // blocks: few, so that they are evicted all the time
)

//go:embed truth_scheduler.py
var truthScheduler []byte

// engine is a vLLM server that tells the truth about itself. Its processes form one group, whose end is the test's end,
// however that comes: the group's leader is a shell that kills the group when its standard input closes.
type engine struct {
	tb         testing.TB
	model      string
	ranks      int
	url        string
	pub, route int // ports of rank 0; rank r has its own at + r
	folder     string

	mu    sync.Mutex
	lives []*life // the newest last
}

// life is one process of an engine, from start to kill.
type life struct {
	began  time.Time
	truths []*truth // by rank
	ended  chan struct{}
	kill   func()
}

// newEngine returns an engine that is not started yet.
func newEngine(tb testing.TB, model string, ranks int) *engine {
	tb.Helper()
	folder, err := filepath.Abs(tb.(interface{ ArtifactDir() string }).ArtifactDir())
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "truth_scheduler.py"), truthScheduler, 0o600); err != nil {
		tb.Fatal(err)
	}
	e := &engine{tb: tb, model: model, ranks: ranks, folder: folder}
	e.pub, e.route = freePorts(tb, ranks), freePorts(tb, ranks)
	e.url = "http://127.0.0.1:" + strconv.Itoa(freePorts(tb, 1))
	tb.Cleanup(func() {
		for _, l := range e.all() {
			l.kill()
		}
		if tb.Failed() {
			e.showLogs()
		}
	})
	return e
}

// start starts a process of the engine and waits until it serves.
func (e *engine) start(ctx context.Context, t testing.TB) {
	t.Helper()
	began := time.Now()
	n := len(e.all())
	truthFile := filepath.Join(e.folder, fmt.Sprintf("truth-%d.jsonl", n))
	log, err := os.Create(e.log(n))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }() // the engine has its own handle
	events, err := json.Marshal(map[string]any{
		"enable_kv_cache_events": true,
		"publisher":              "zmq",
		"topic":                  "kv-events",
		// Without a wildcard vLLM would connect out instead of bind.
		"endpoint":        fmt.Sprintf("tcp://*:%d", e.pub),
		"replay_endpoint": fmt.Sprintf("tcp://*:%d", e.route),
	})
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(strings.TrimPrefix(e.url, "http://"), ":")
	const supervise = `("$@" </dev/null; echo "the engine ended by itself: $?"; kill -9 0) & read -r _; kill -9 0`
	cmd := exec.Command("/bin/sh", "-c", supervise, "sh", os.Getenv("KVTAP_E2E_PYTHON"),
		"-m", "vllm.entrypoints.openai.api_server",
		"--model", filepath.Join(os.Getenv("KVTAP_E2E_MODELS"), e.model), "--served-model-name", "tiny",
		"--host", host, "--port", port,
		"--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--seed", "1",
		"--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048",
		"--block-size", strconv.Itoa(blockSize), "--num-gpu-blocks-override", strconv.Itoa(pool),
		"--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
		"--data-parallel-size", strconv.Itoa(e.ranks),
		"--scheduler-cls", "truth_scheduler.TruthScheduler",
		"--kv-events-config", string(events))
	cmd.Dir, cmd.Stdout, cmd.Stderr = e.folder, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(os.Environ(),
		"PYTHONPATH="+e.folder, "PYTHONDONTWRITEBYTECODE=", "KVTAP_E2E_TRUTH="+truthFile,
		"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1",
		"VLLM_SERVER_DEV_MODE=1", // for /reset_prefix_cache
		"VLLM_HOST_IP=127.0.0.1", "VLLM_CACHE_ROOT="+filepath.Join(e.folder, "cache"),
		"VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1")
	leash, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l := &life{began: began, ended: make(chan struct{})}
	for rank := range e.ranks {
		path := truthFile
		if rank > 0 {
			path += "." + strconv.Itoa(rank)
		}
		l.truths = append(l.truths, &truth{path: path})
	}
	go func() {
		defer close(l.ended)
		_ = cmd.Wait() // it ends by a kill, as it should
	}()
	l.kill = sync.OnceFunc(func() {
		select {
		case <-l.ended: // its number may belong to another group by now
		default:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
		<-l.ended
		_ = leash.Close()
	})
	e.mu.Lock()
	e.lives = append(e.lives, l)
	e.mu.Unlock()

	every := time.NewTicker(200 * time.Millisecond)
	defer every.Stop()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, e.url+"/health", nil)
		if err != nil {
			t.Fatal(err)
		}
		if response, err := http.DefaultClient.Do(request); err == nil {
			_ = response.Body.Close() // read for its status alone
			if response.StatusCode == http.StatusOK {
				break
			}
		}
		select {
		case <-every.C:
		case <-l.ended:
			t.Fatalf("the %s engine ended before it served", e.model)
		case <-ctx.Done():
			t.Fatalf("the %s engine does not serve: %v", e.model, ctx.Err())
		}
	}
	t.Logf("the %s engine served after %.0f s", e.model, time.Since(began).Seconds())
}

// all returns the lives so far.
func (e *engine) all() []*life {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.lives)
}

// now returns the present life, and its number.
func (e *engine) now() (*life, int) {
	lives := e.all()
	return lives[len(lives)-1], len(lives) - 1
}

// published returns how many batches a rank has published in the present life.
func (e *engine) published(rank int) (int, error) {
	now, _ := e.now()
	return now.truths[rank].count()
}

// lifeAt returns the number of the life that made a batch of this time, in seconds since 1970.
func (e *engine) lifeAt(seconds float64) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.lives) - 1
	for n > 0 && seconds < float64(e.lives[n].began.UnixMicro())/1e6 {
		n--
	}
	return n
}

func (e *engine) log(life int) string {
	return filepath.Join(e.folder, fmt.Sprintf("engine-%d.log", life))
}

// showLogs logs the last 50 lines of each life.
func (e *engine) showLogs() {
	for n := range e.all() {
		text, err := os.ReadFile(e.log(n))
		if err != nil {
			e.tb.Log(err)
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		e.tb.Logf("the end of %s:\n%s", e.log(n), strings.Join(lines[max(0, len(lines)-50):], "\n"))
	}
}

// completion is a request to the engine: a prompt, or a chat.
type completion struct {
	Model       string            `json:"model"`
	Prompt      []int             `json:"prompt,omitempty"`
	Messages    []message         `json:"messages,omitempty"`
	MaxTokens   int               `json:"max_tokens"`
	Temperature float64           `json:"temperature"`
	IgnoreEOS   bool              `json:"ignore_eos"`
	CacheSalt   string            `json:"cache_salt,omitempty"`
	XArgs       map[string]string `json:"vllm_xargs,omitempty"`

	rank int // sent as a header if not negative
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// ask is a completion of tokens after prompt.
func ask(prompt []int, tokens int) completion {
	return completion{Model: "tiny", Prompt: prompt, MaxTokens: tokens, IgnoreEOS: true, rank: -1}
}

// answer is what the engine said.
type answer struct {
	text   string
	cached int // tokens of the prompt that it did not compute
}

// complete has the engine answer one request.
func (e *engine) complete(ctx context.Context, c completion) (answer, error) {
	path := "/v1/completions"
	if c.Messages != nil {
		path = "/v1/chat/completions"
	}
	body, err := json.Marshal(c)
	if err != nil {
		return answer{}, err
	}
	header := http.Header{"Content-Type": {"application/json"}}
	if c.rank >= 0 {
		header.Set("X-Data-Parallel-Rank", strconv.Itoa(c.rank))
	}
	var said struct {
		Choices []struct {
			Text    string
			Message message
		}
		Usage struct {
			Details struct {
				Cached int `json:"cached_tokens"`
			} `json:"prompt_tokens_details"`
		}
	}
	if err := e.post(ctx, path, header, body, &said); err != nil {
		return answer{}, err
	}
	if len(said.Choices) == 0 {
		return answer{}, errors.New("an answer without a choice")
	}
	return answer{said.Choices[0].Text + said.Choices[0].Message.Content, said.Usage.Details.Cached}, nil
}

func (e *engine) post(ctx context.Context, path string, header http.Header, body []byte, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header = header
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }() // read to its end, or given up
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("POST %s: %s: %.500s", path, response.Status, text)
	}
	return json.Unmarshal(text, into)
}

// completeAll has the engine answer requests, width of them at a time, and returns how many tokens of their prompts it
// reused.
func (e *engine) completeAll(ctx context.Context, width int, requests []completion) (cached int, err error) {
	var mu sync.Mutex
	var workers sync.WaitGroup
	queue := make(chan completion)
	for range width {
		workers.Go(func() {
			for c := range queue {
				a, failed := e.complete(ctx, c)
				mu.Lock()
				cached, err = cached+a.cached, errors.Join(err, failed)
				mu.Unlock()
			}
		})
	}
	for _, c := range requests {
		queue <- c
	}
	close(queue)
	workers.Wait()
	return cached, err
}

// reset has the engine drop its cache, of which nothing is published before its next step. It reports whether it did.
func (e *engine) reset(ctx context.Context, running bool) (bool, error) {
	var done struct{ Success bool }
	path := "/reset_prefix_cache?reset_running_requests=" + strconv.FormatBool(running)
	err := e.post(ctx, path, http.Header{}, nil, &done)
	return done.Success, err
}

// ports are those handed out by freePorts.
var ports = struct {
	sync.Mutex
	taken map[int]bool
}{taken: map[int]bool{}}

// freePorts returns the first of n consecutive TCP ports that nobody listens on, from below those that systems give to
// outgoing connections.
func freePorts(tb testing.TB, n int) int {
	tb.Helper()
	ports.Lock()
	defer ports.Unlock()
	for range 1000 {
		first := 20000 + rand.IntN(8000)
		free := true
		for port := first; port < first+n && free; port++ {
			listener, err := net.Listen("tcp", ":"+strconv.Itoa(port))
			if err == nil {
				_ = listener.Close() // it accepted nothing
			}
			free = err == nil && !ports.taken[port]
		}
		if !free {
			continue
		}
		for port := first; port < first+n; port++ {
			ports.taken[port] = true
		}
		return first
	}
	tb.Fatalf("no %d free ports in a row", n)
	return 0
}
