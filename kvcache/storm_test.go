// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// storm is how many engines the tests of this file have. The default keeps them quick.
var storm = flag.Int("storm", 200, "engines in the tests of restart storms")

// fleet is many engines and a client for each.
type fleet struct {
	n       *network
	engines []*enginesim.Engine
	clients []*kvcache.ZMQClient
	folds   []tally
	limiter *turnstile

	mu    sync.Mutex
	dials []time.Time // attempts to connect to a PUB socket
}

// tally counts what came since the last reset.
type tally struct {
	events
	mu      sync.Mutex
	batches int
	resets  int
}

func (c *tally) HandleBatch(*event.Batch, kvcache.BatchInfo) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batches++
	return nil
}

func (c *tally) HandleReset(kvcache.Reset) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batches = 0
	c.resets++
	return nil
}

func (f *fleet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if strings.HasPrefix(address, "10.1.") {
		f.mu.Lock()
		f.dials = append(f.dials, time.Now())
		f.mu.Unlock()
	}
	return f.n.Dial(ctx, network, address)
}

func (f *fleet) endpoints(i int) (pub, replay string) {
	host := strconv.Itoa(i/250) + "." + strconv.Itoa(i%250+1)
	return "tcp://10.1." + host + ":5557", "tcp://10.2." + host + ":5558"
}

// start starts all engines, each with so many batches published before its sockets open.
func (f *fleet) start(life, batches int) {
	for i := range f.engines {
		f.engines[i] = f.n.engine(func(c *enginesim.Config) { c.PubEndpoint, c.ReplayEndpoint = f.endpoints(i) })
		for b := range batches {
			if err := f.engines[i].Publish(stored(event.Hash(life<<32 + b))); err != nil {
				f.n.t.Fatal(err)
			}
		}
	}
}

func (f *fleet) stop() {
	for _, e := range f.engines {
		if err := e.Close(); err != nil {
			f.n.t.Fatal(err)
		}
	}
}

// ready returns how many clients are live and exact with so many batches.
func (f *fleet) ready(batches int) (n int) {
	for i, c := range f.clients {
		f.folds[i].mu.Lock()
		all := f.folds[i].batches == batches
		f.folds[i].mu.Unlock()
		if s := c.State(); all && s.State == kvcache.StateLive && s.Bound == kvcache.BoundExact {
			n++
		}
	}
	return n
}

// until waits in steps of 100 ms until all are ready, and returns how long that took.
func (f *fleet) until(batches int) time.Duration {
	begin := time.Now()
	for f.ready(batches) < len(f.clients) {
		if time.Since(begin) > 5*time.Minute {
			f.n.t.Fatalf("%d of %d clients are live and exact after 5 minutes", f.ready(batches), len(f.clients))
		}
		time.Sleep(100 * time.Millisecond)
	}
	return time.Since(begin)
}

func TestARestartStormDoesNotSynchronise(t *testing.T) {
	t.Parallel()
	const batches = 20
	inBubble(t, func(t *testing.T, n *network) {
		f := &fleet{
			n: n, engines: make([]*enginesim.Engine, *storm), folds: make([]tally, *storm),
			limiter: &turnstile{ReplayLimiter: kvcache.NewReplayLimiter(kvcache.DefaultReplays)},
		}
		f.start(0, batches)
		for i := range f.engines {
			config := n.config()
			config.PodKey = "pod-" + strconv.Itoa(i)
			config.Registerer = nil
			config.Dial, config.ReplayLimiter = f.dial, f.limiter
			config.PubEndpoint, config.ReplayEndpoint = f.endpoints(i)
			f.clients = append(f.clients, n.client(config, &f.folds[i]))
		}
		t.Logf("%d clients live and exact %v after their start", *storm, f.until(batches))

		f.stop()
		time.Sleep(time.Minute) // long enough for any rhythm they had to be shared
		f.mu.Lock()
		f.dials = nil
		f.mu.Unlock()
		time.Sleep(20 * time.Second)
		f.mu.Lock()
		dials := f.dials
		f.mu.Unlock()
		windows := map[int]int{}
		most := 0
		for _, at := range dials {
			w := int(at.Sub(dials[0]) / (100 * time.Millisecond))
			windows[w]++
			most = max(most, windows[w])
		}
		t.Logf("while the engines are down: %d attempts in 20s, at most %d in 100ms", len(dials), most)
		// Each client tries at least every 5 s, so 4 or more times. Attempts in step would fill a window with all clients.
		if len(dials) < 4**storm || len(dials) > 20**storm || most > max(*storm/4, 50) {
			t.Errorf("%d attempts of %d clients in 20s, %d of them within 100ms", len(dials), *storm, most)
		}

		f.start(1, batches+5) // each has overtaken the old number
		t.Logf("all restarted: live and exact after %v", f.until(batches+5))
		if most := f.limiter.most.Load(); most > kvcache.DefaultReplays {
			t.Errorf("%d replays at once", most)
		}
		for i := range f.folds {
			if f.folds[i].resets != 2 { // start and restart
				t.Errorf("client %d: %d resets", i, f.folds[i].resets)
			}
		}
	})
}

// The same over real sockets, and what many idle clients cost. It takes seconds, so it runs only if asked for:
//
//	go test -run TestManyEnginesOverRealSockets -v ./kvcache -args -storm=1000 -sockets
var sockets = flag.Bool("sockets", false, "run the tests of many engines over real sockets")

func TestManyEnginesOverRealSockets(t *testing.T) {
	if !*sockets {
		t.Skip("runs with -args -sockets")
	}
	const batches = 20
	f := &fleet{n: &network{t: t}, engines: make([]*enginesim.Engine, *storm), folds: make([]tally, *storm)}
	replays := make([]string, *storm)
	pubs := make([]string, *storm)
	start := func(life, batches int) {
		for i := range f.engines {
			e, err := enginesim.New(enginesim.Config{
				PubEndpoint: orFree(pubs[i]), ReplayEndpoint: orFree(replays[i]), Quiet: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			for b := range batches {
				if err := e.Publish(stored(event.Hash(life<<32 + b))); err != nil {
					t.Fatal(err)
				}
			}
			if err := e.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			f.engines[i] = e
			pubs[i], replays[i] = e.Endpoints()
		}
	}
	start(0, batches)
	defer func() { f.stop() }()
	before := resident(t)
	for i := range f.engines {
		config := kvcache.DefaultZMQClientConfig("pod-"+strconv.Itoa(i), "127.0.0.1", "m")
		config.PubEndpoint, config.ReplayEndpoint = pubs[i], replays[i]
		c := kvcache.NewZMQClient(config, &f.folds[i])
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := c.Stop(); err != nil {
				t.Error(err)
			}
		}()
		f.clients = append(f.clients, c)
	}
	t.Logf("%d clients live and exact %v after their start", *storm, f.until(batches))
	time.Sleep(3 * time.Second)
	runtime.GC()
	after := resident(t)
	t.Logf("resident memory: %d KiB a client, its engine's two connections included", (after-before)>>10/int64(*storm))
	t.Logf("%d goroutines", runtime.NumGoroutine())

	f.stop()
	time.Sleep(10 * time.Second)
	begin := time.Now()
	start(1, batches+5)
	t.Logf("all engines restarted, within %v; live and exact %v after that", time.Since(begin), f.until(batches+5))
}

func orFree(endpoint string) string {
	if endpoint == "" {
		return "tcp://127.0.0.1:0"
	}
	return endpoint
}

// resident returns the process's resident memory in bytes, after a collection.
func resident(t *testing.T) int64 {
	t.Helper()
	runtime.GC()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip(err)
	}
	var size, pages int64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
