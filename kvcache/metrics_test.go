// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// figures are the values of a registry's metrics by name and last label; of histograms the count, and the sum as
// name:sum.
type figures map[string]float64

// gather reads the metrics of a namespace, and fails if another is there or an engine's labels are not those wanted.
func gather(t *testing.T, reg prometheus.Gatherer, namespace string, engine ...string) figures {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := figures{}
	for _, f := range families {
		short, ok := strings.CutPrefix(f.GetName(), namespace+"_kvcache_zmq_")
		if !ok {
			if reg != prometheus.DefaultGatherer {
				t.Errorf("%s is not of the namespace %s", f.GetName(), namespace)
			}
			continue
		}
		for _, m := range f.GetMetric() {
			var of, others []string
			for _, l := range m.GetLabel() {
				if l.GetName() == "pod_key" || l.GetName() == "rank" {
					of = append(of, l.GetName()+"="+l.GetValue())
				} else {
					others = append(others, l.GetValue())
				}
			}
			name := strings.Join(append([]string{short}, others...), ":")
			h := m.GetHistogram()
			if h != nil && namespace == kvcache.NamespaceKvtap {
				if len(of) > 0 {
					t.Errorf("%s has a series per engine: %v", short, of)
				}
			} else if len(engine) > 0 && !slices.Equal(of, engine) {
				t.Errorf("%s is of %v, want %v", name, of, engine)
			}
			values[name] += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(h.GetSampleCount())
			if h != nil {
				values[name+":sum"] += h.GetSampleSum()
			}
		}
	}
	return values
}

// check compares some figures with what they should be.
func (f figures) check(t *testing.T, want figures) {
	t.Helper()
	for name, v := range want {
		if got, ok := f[name]; !ok {
			t.Errorf("%s is missing", name)
		} else if got != v {
			t.Errorf("%s is %v, want %v", name, got, v)
		}
	}
}

// sum adds the figures of one metric over its other label.
func (f figures) sum(name string) (sum float64) {
	for key, v := range f {
		if strings.HasPrefix(key, name+":") {
			sum += v
		}
	}
	return sum
}

// ofEngines leaves out what is of all engines together.
func (f figures) ofEngines(namespace string) figures {
	if namespace == kvcache.NamespaceKvtap {
		for _, name := range []string{"event_processing_duration_seconds", "event_lag_seconds"} {
			delete(f, name)
			delete(f, name+":sum")
		}
	}
	return f
}

// stage is an engine that does only what its test says.
type stage struct {
	t   *testing.T
	pub *zmtp.Publisher

	mu   sync.Mutex
	kept []kept // what the replay endpoint has
	mute bool   // replays are not answered
}

type kept struct {
	seq     uint64
	payload []byte
}

func frameOf(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

// stage opens the engine's sockets.
func (n *network) stage(batches ...kept) *stage {
	n.t.Helper()
	s := &stage{t: n.t, pub: zmtp.NewPublisher(&zmtp.Options{ListenFunc: n.Listen}, 0), kept: batches}
	n.router(func(r *zmtp.Router, id string, frames [][]byte) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.mute {
			return
		}
		for _, b := range s.kept {
			if b.seq >= binary.BigEndian.Uint64(frames[1]) {
				r.Send(id, nil, nil, frameOf(b.seq), b.payload)
			}
		}
		r.Send(id, nil, nil, frameOf(math.MaxUint64), nil)
	})
	l, err := zmtp.Listen(n.t.Context(), pubEndpoint, &zmtp.Options{ListenFunc: n.Listen})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.pub.Serve(ctx, l) })
	n.t.Cleanup(func() {
		cancel()
		s.pub.Close()
		wg.Wait()
	})
	return s
}

// lose publishes a batch that only replays bring.
func (s *stage) lose(seq uint64, payload []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = append(s.kept, kept{seq, payload})
}

// send publishes a batch.
func (s *stage) send(seq uint64, payload []byte) {
	s.lose(seq, payload)
	s.pub.Send(nil, frameOf(seq), payload)
	synctest.Wait()
}

// silence ends the answers to replays, or lets them begin again.
func (s *stage) silence(mute bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mute = mute
}

// restart makes the engine a new process with nothing to replay but batches.
func (s *stage) restart(n *network, batches ...kept) {
	s.mu.Lock()
	s.kept = batches
	s.mu.Unlock()
	if err := n.Cut(); err != nil {
		s.t.Fatal(err)
	}
}

// metered is config with a Registerer, and limits that are of the bubble.
func (n *network) metered(reg prometheus.Registerer, namespace string) *kvcache.ZMQClientConfig {
	config := n.config()
	config.Registerer, config.MetricsNamespace = reg, namespace
	config.ReplayLimiter, config.HoldBudget = kvcache.NewReplayLimiter(1), kvcache.NewHoldBudget(1<<20)
	return config
}

// spy is a Registerer that notes the names that are registered.
type spy struct {
	*prometheus.Registry
	names []string
}

var fqName = regexp.MustCompile(`fqName: "([^"]+)"`)

func (s *spy) Register(c prometheus.Collector) error {
	descs := make(chan *prometheus.Desc, 1)
	c.Describe(descs)
	s.names = append(s.names, fqName.FindStringSubmatch((<-descs).String())[1])
	return s.Registry.Register(c)
}

// ofUnknownType is a batch, said to be of 1970, whose one event is of a type that nobody knows.
var ofUnknownType = []byte("\x92\x00\x91\x91\xa3New")

// play starts a client and lets an engine do everything that moves a metric. It checks the figures on the way, and
// returns those at the end.
func (n *network) play(t *testing.T, namespace string) (reg *spy, c *kvcache.ZMQClient, end figures) {
	t.Helper()
	reg = &spy{Registry: prometheus.NewPedanticRegistry()}
	config := n.metered(reg, namespace)
	config.Rank = 2
	config.VerifyInterval = -1 // no replays but those of the script
	engine := []string{"pod_key=default/pod-0", "rank=2"}
	if namespace == kvcache.NamespaceAIBrix {
		engine = []string{"pod_key=default/pod-0:2"}
	}
	now := func() figures {
		synctest.Wait()
		return gather(t, reg, namespace, engine...)
	}
	h := events{fail: func(i int) error {
		if i == 0 {
			return errors.New("no")
		}
		return nil
	}}
	c = n.client(config, &h)
	time.Sleep(4 * time.Second) // connection refused
	now().check(t, figures{
		"connections_total": 0, "connection_status": 0, "stream_state": 0, "stream_bound": 1,
		"errors_total:connection": 1, "errors_total:consume_events": 0, "errors_total:handle_event": 0,
	})

	s := n.stage(kept{0, stored(1)})
	time.Sleep(6 * time.Second)
	now().check(t, figures{
		"connection_status": 1, "stream_state": 2, "stream_bound": 2, "pending_bytes": 0, "last_sequence_id": 0,
		"replayed_events_total": 1, "event_lag_seconds": 0, "errors_total:handle_event": 1,
	})

	late := event.Batch{
		Time: event.Some(float64(time.Now().Add(-2*time.Second).UnixMicro()) / 1e6),
		Events: []event.Event{
			{Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{1}},
			{Type: event.AllBlocksCleared, Map: true},
		},
	}
	payload, err := late.Append(nil, event.VLLM032)
	if err != nil {
		t.Fatal(err)
	}
	s.send(1, payload)
	s.send(2, stored(2)) // by a clock that is ahead of ours
	now().check(t, figures{"event_lag_seconds": 2, "event_lag_seconds:sum": 2})
	s.pub.Send([]byte("neither"), []byte("one nor the other"))
	s.send(3, ofUnknownType)
	now().check(t, figures{"stream_bound": 1, "event_lag_seconds": 3, "event_lag_seconds:sum": 3602})
	s.send(4, []byte("junk"))
	s.send(7, stored(3)) // 5 and 6 were burned
	now().check(t, figures{
		"last_sequence_id": 7, "missed_events_total": 2, "burned_sequences_total": 2, "replayed_events_total": 2,
		"resets_total:unreadable": 1, "replay_failures_total": 0,
	})

	s.silence(true)
	s.lose(8, stored(4))
	s.send(9, stored(5))
	if f := now(); f["stream_state"] != 3 || f["pending_bytes"] < 1 ||
		f["pending_bytes"] != float64(c.Stats().HeldBytes) {
		t.Errorf("while a replay is waited for: state %v, %v bytes pending", f["stream_state"], f["pending_bytes"])
	}
	time.Sleep(4 * time.Second)
	s.silence(false)
	time.Sleep(6 * time.Second)
	now().check(t, figures{
		"stream_state": 2, "pending_bytes": 0, "last_sequence_id": 9, "missed_events_total": 3,
		"replay_failures_total": 1, "errors_total:replay": 1,
	})

	s.restart(n, kept{0, stored(10)})
	now().check(t, figures{"connection_status": 0, "disconnections_total": 1, "errors_total:connection": 2})
	time.Sleep(6 * time.Second)
	now().check(t, figures{"connection_status": 1, "resets_total:restart": 1, "last_sequence_id": 0, "stream_bound": 2})
	c.Reset("maintenance")
	time.Sleep(6 * time.Second)
	return reg, c, now()
}

func TestEveryMetricMovesAndNoneIsLeftAfterStop(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{kvcache.NamespaceKvtap, kvcache.NamespaceAIBrix} {
		t.Run(namespace, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				reg, c, got := n.play(t, namespace)
				got.check(t, figures{
					"connections_total":                       3,
					"disconnections_total":                    2,
					"events_received_total:BlockStored":       7,
					"events_received_total:BlockRemoved":      1,
					"events_received_total:AllBlocksCleared":  1,
					"events_processed_total:BlockStored":      6,
					"events_processed_total:BlockRemoved":     1,
					"events_processed_total:AllBlocksCleared": 1,
					"event_processing_duration_seconds":       9,
					"missed_events_total":                     3,
					"burned_sequences_total":                  2,
					"replay_failures_total":                   1,
					"errors_total:connection":                 2,
					"errors_total:consume_events":             1,
					"errors_total:decode":                     1,
					"errors_total:handle_event":               1,
					"errors_total:replay":                     1,
					"resets_total:start":                      1,
					"resets_total:unreadable":                 1,
					"resets_total:restart":                    1,
					"resets_total:maintenance":                1,
					"skipped_events_total:unknown_type":       1,
					"connection_status":                       1,
					"last_sequence_id":                        0,
					"pending_bytes":                           0,
					"stream_state":                            2,
					"stream_bound":                            2,
				})
				// Only the first attempt and lost connections are of the kind connection.
				if n, attempts := got["errors_total:reconnect"], got["reconnect_attempts_total"]; n < 1 || attempts != n+3 {
					t.Errorf("%v errors of %v attempts to reconnect, of which 3 succeeded", n, attempts)
				}
				s := c.Stats()
				got.check(t, figures{
					"connections_total":       float64(s.Connections),
					"disconnections_total":    float64(s.Disconnections),
					"missed_events_total":     float64(s.Missed),
					"burned_sequences_total":  float64(s.Burned),
					"duplicate_batches_total": float64(s.Duplicates),
					"replay_requests_total":   float64(s.Replays),
					"replay_success_total":    float64(s.Replays - s.ReplayFailures),
					"replay_failures_total":   float64(s.ReplayFailures),
				})
				if events, resets := got.sum("events_received_total"), got.sum("resets_total"); events != float64(s.Events) ||
					resets != float64(s.Resets) {
					t.Errorf("%v events and %v resets, by Stats %d and %d", events, resets, s.Events, s.Resets)
				}
				// How many there are is the sequencer's affair.
				least := figures{
					"replay_requests_total": 5, "duplicate_batches_total": 1, "replayed_events_total": 5, "event_lag_seconds": 3,
				}
				for name, least := range least {
					if got[name] < least {
						t.Errorf("%s is %v, want %v at least", name, got[name], least)
					}
				}
				moved := shortNames(got)
				for _, name := range reg.names {
					if short := strings.TrimPrefix(name, namespace+"_kvcache_zmq_"); !moved[short] {
						t.Errorf("%s is registered and nothing moves it", short)
					}
				}

				if err := c.Stop(); err != nil {
					t.Fatal(err)
				}
				left := gather(t, reg, namespace)
				if namespace == kvcache.NamespaceKvtap {
					left.check(t, figures{
						"event_processing_duration_seconds": 9, "event_lag_seconds": got["event_lag_seconds"],
					})
				}
				if left := left.ofEngines(namespace); len(left) > 0 {
					t.Errorf("left after Stop: %v", left)
				}
			})
		})
	}
}

// shortNames returns the names of figures without their labels.
func shortNames(f figures) map[string]bool {
	names := map[string]bool{}
	for key := range f {
		name, _, _ := strings.Cut(key, ":")
		names[name] = true
	}
	return names
}

// documented returns docs/metrics.md.
func documented(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

func TestTheDocumentationListsEveryMetric(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		text := documented(t)
		reg, _, got := n.play(t, kvcache.NamespaceKvtap)
		lint(t, reg)

		type row struct{ Type, Labels string }
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]row{}
		for _, f := range families {
			var labels []string
			for _, l := range f.GetMetric()[0].GetLabel() {
				labels = append(labels, l.GetName())
			}
			slices.Sort(labels)
			want[f.GetName()] = row{strings.ToLower(f.GetType().String()), strings.Join(labels, " ")}
		}
		// | `name` | type | labels | question? answer |
		rows := map[string]row{}
		for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (\\w+) \\| ([^|]*) \\| [A-Z][^|?]+\\?[^|]* \\|$").
			FindAllStringSubmatch(text, -1) {
			labels := regexp.MustCompile("[a-z_]+").FindAllString(strings.TrimPrefix(m[3], "none"), -1)
			slices.Sort(labels)
			rows[m[1]] = row{m[2], strings.Join(labels, " ")}
		}
		if diff := cmp.Diff(want, rows); diff != "" {
			t.Errorf("the tables of docs/metrics.md are not what is registered (-registered +documented):\n%s", diff)
		}
		// Names elsewhere, as in queries.
		for _, name := range regexp.MustCompile(`\b(?:kvtap|aibrix)_kvcache_zmq_[a-z_]+`).FindAllString(text, -1) {
			name = "kvtap_" + strings.TrimPrefix(strings.TrimPrefix(name, "kvtap_"), "aibrix_")
			if want[strings.TrimSuffix(name, "_bucket")].Type == "histogram" {
				continue
			}
			if _, ok := want[name]; !ok {
				t.Errorf("docs/metrics.md names %s, which is not registered", name)
			}
		}

		// The values of labels.
		words := []string{
			"missing_field", "no_type", "not_an_event", "bad_field", "truncated", "other",
			string(kvcache.ReasonStart), string(kvcache.ReasonRestart), string(kvcache.ReasonHistoryLost),
			string(kvcache.ReasonUnreadable), string(kvcache.ReasonCaller), string(kvcache.ReasonResync),
		}
		for key := range got {
			if _, word, ok := strings.Cut(key, ":"); ok && word != "sum" && word != "maintenance" {
				words = append(words, word)
			}
		}
		slices.Sort(words)
		for _, word := range slices.Compact(words) {
			if !strings.Contains(text, "`"+word+"`") {
				t.Errorf("docs/metrics.md does not say what %s means", word)
			}
		}
	})
}

// lint applies Prometheus' own rules for names and help texts.
func lint(t *testing.T, reg prometheus.Gatherer) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, f := range families {
		if !strings.HasSuffix(f.GetHelp(), ".") {
			t.Errorf("%s: the help is no sentence: %q", f.GetName(), f.GetHelp())
		}
	}
}

func TestTheDocumentationSaysWhatAnEngineCosts(t *testing.T) {
	t.Parallel()
	text := documented(t)
	for _, namespace := range []string{kvcache.NamespaceKvtap, kvcache.NamespaceAIBrix} {
		inBubble(t, func(t *testing.T, n *network) {
			reg := prometheus.NewRegistry()
			series := func() (count int) {
				families, err := reg.Gather()
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range families {
					for _, m := range f.GetMetric() {
						count++
						if h := m.GetHistogram(); h != nil {
							count += len(h.GetBucket()) + 2 // and the bucket of infinity, the sum and the count
						}
					}
				}
				return count
			}
			start := func(rank int) {
				config := n.metered(reg, namespace)
				config.Rank = rank
				n.client(config, &events{})
				synctest.Wait()
			}
			n.stage(kept{0, stored(1)})
			start(0)
			first := series()
			start(1)
			per := series() - first
			want := []string{fmt.Sprintf("%d series in the namespace `%s`", per, namespace)}
			if shared := first - per; shared > 0 {
				want = append(want, fmt.Sprintf("%d series for all engines together", shared))
			}
			for _, want := range want {
				if !strings.Contains(text, want) {
					t.Errorf("docs/metrics.md does not say %q", want)
				}
			}
		})
	}
}

func TestAClientWithoutEngineMetricsHasNoSeriesOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{kvcache.NamespaceKvtap, kvcache.NamespaceAIBrix} {
		t.Run(namespace, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				reg := prometheus.NewPedanticRegistry()
				config := n.metered(reg, namespace)
				config.NoEngineMetrics = true
				s := n.stage(kept{0, stored(1)})
				c := n.client(config, &events{})
				synctest.Wait()
				s.send(1, stored(2))
				s.send(2, ofUnknownType)
				s.send(3, []byte("junk"))
				s.pub.Send([]byte("neither"), []byte("one nor the other"))
				s.send(7, stored(3))
				s.restart(n, kept{0, stored(10)})
				time.Sleep(6 * time.Second)
				c.Reset("maintenance")
				time.Sleep(6 * time.Second)
				if s := c.Stats(); s.Connections != 3 || s.Events != 5 || s.Resets < 4 {
					t.Errorf("stats %+v", s)
				}
				want := figures{}
				if namespace == kvcache.NamespaceKvtap {
					want = figures{
						"event_processing_duration_seconds": 5, "event_processing_duration_seconds:sum": 0,
						"event_lag_seconds": 2, "event_lag_seconds:sum": 3600,
					}
				}
				if diff := cmp.Diff(want, gather(t, reg, namespace)); diff != "" {
					t.Errorf("metrics (-want +got):\n%s", diff)
				}
				if err := kvcache.NewZMQClient(config, &events{}).Start(); !errors.Is(err, kvcache.ErrDuplicateClient) {
					t.Errorf("a second client: %v", err)
				}
				if err := c.Stop(); err != nil {
					t.Fatal(err)
				}
				n.client(config, &events{}) // the place is free again
			})
		})
	}
}

func TestNoTwoClientsShareASeries(t *testing.T) {
	t.Parallel()
	const kvtap, aibrix = kvcache.NamespaceKvtap, kvcache.NamespaceAIBrix
	duplicate, ambiguous := kvcache.ErrDuplicateClient, kvcache.ErrAmbiguousPodKey
	type client struct {
		namespace, pod string
		rank           int
		silent         bool // NoEngineMetrics
	}
	for _, test := range []struct {
		name       string
		one, other client
		want       error
	}{
		{"one pod, one rank", client{pod: "a"}, client{pod: "a"}, duplicate},
		{"the default namespace by its name", client{pod: "a"}, client{namespace: kvtap, pod: "a"}, duplicate},
		{"one pod, one rank, two namespaces", client{kvtap, "a", 1, false}, client{aibrix, "a", 1, false}, duplicate},
		{"one of them without metrics", client{aibrix, "a", 0, false}, client{aibrix, "a", 0, true}, duplicate},
		{"two pods", client{pod: "a"}, client{pod: "b"}, nil},
		{"one pod, two ranks", client{pod: "a"}, client{pod: "a", rank: 1}, nil},
		{"one pod, two ranks, for AIBrix", client{aibrix, "a", 0, false}, client{aibrix, "a", 1, false}, nil},
		{"a pod key that ends like a rank", client{aibrix, "a:1", 0, false}, client{aibrix, "a", 1, false}, ambiguous},
		{"a rank before such a pod key", client{aibrix, "a", 1, false}, client{aibrix, "a:1", 0, false}, ambiguous},
		{"such a pod key and rank 0", client{aibrix, "a:1", 0, false}, client{aibrix, "a", 0, false}, nil},
		{"such a pod key, and ranks in a label", client{kvtap, "a:1", 0, false}, client{kvtap, "a", 1, false}, nil},
		{"such a pod key in the other namespace", client{kvtap, "a:1", 0, false}, client{aibrix, "a", 1, false}, nil},
		{"such a pod key without metrics", client{aibrix, "a:1", 0, true}, client{aibrix, "a", 1, false}, nil},
		{"such pod keys, both without metrics", client{aibrix, "a:1", 0, true}, client{aibrix, "a", 1, true}, nil},
		{"pod keys that are not UTF-8", client{pod: "\xff"}, client{pod: "\xfe"}, ambiguous},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				reg := prometheus.NewPedanticRegistry()
				config := func(c client) *kvcache.ZMQClientConfig {
					config := n.metered(reg, c.namespace)
					config.PodKey, config.Rank, config.NoEngineMetrics = c.pod, c.rank, c.silent
					return config
				}
				one := n.client(config(test.one), &events{})
				other := kvcache.NewZMQClient(config(test.other), &events{})
				defer func() { _ = other.Stop() }()
				err := other.Start()
				if !errors.Is(err, test.want) {
					t.Fatalf("Start: %v, want %v", err, test.want)
				}
				synctest.Wait()
				if _, err := reg.Gather(); err != nil {
					t.Error(err)
				}
				if err == nil {
					return
				}
				if err := one.Stop(); err != nil {
					t.Fatal(err)
				}
				n.client(config(test.other), &events{}) // the place is free again
			})
		})
	}
}

func TestResetReasonsOfCallersAreBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		reg := prometheus.NewPedanticRegistry()
		c := n.client(n.metered(reg, ""), &events{})
		reset := func(reason string) {
			c.Reset(kvcache.Reason(reason))
			synctest.Wait()
		}
		reset("not \xff text")
		reset("not \xfe text")
		for i := range 40 {
			reset("reason " + strconv.Itoa(i))
		}
		for _, reason := range []string{"", "other", "reason 0", "reason 39", string(kvcache.ReasonRestart)} {
			reset(reason)
		}
		got := gather(t, reg, kvcache.NamespaceKvtap)
		got.check(t, figures{
			"resets_total:not \uFFFD text": 2, "resets_total:reason 0": 2, "resets_total:reason 30": 1,
			"resets_total:other": 11, "resets_total:caller": 1, "resets_total:restart": 1,
		})
		reasons := 0
		for name := range got {
			if strings.HasPrefix(name, "resets_total:") {
				reasons++
			}
		}
		if reasons != 32+len([]string{"other", "caller", "restart"}) {
			t.Errorf("%d reasons have a series", reasons)
		}
		if err := c.Stop(); err != nil {
			t.Fatal(err)
		}
		if left := gather(t, reg, kvcache.NamespaceKvtap).ofEngines(kvcache.NamespaceKvtap); len(left) > 0 {
			t.Errorf("left after Stop: %v", left)
		}
	})
}

func TestSkippedEventsHaveOneWordEach(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		reg := prometheus.NewPedanticRegistry()
		config := n.metered(reg, "")
		config.NoReplay = true
		s := n.stage()
		n.client(config, &events{})
		synctest.Wait()
		const removed = "\xacBlockRemoved"
		want := figures{}
		for i, test := range []struct{ event, word string }{
			{"\x91\xa3New", "unknown_type"},
			{"\x81\xa4type\xa3New", "unknown_type"},
			{"\x90", "no_type"},
			{"\x91\x01", "no_type"},
			{"\x80", "no_type"},
			{"\x81\xa4type\x01", "no_type"},
			{"\x01", "not_an_event"},
			{"\x91" + removed, "missing_field"},
			{"\x81\xa4type" + removed, "missing_field"},
			{"\x92" + removed + "\xa1x", "bad_field"},
			{"\x82\xa4type" + removed + "\xacblock_hashes\x91\xc3", "bad_field"},
			{"\x93" + removed + "\x91\x01\x01", "bad_field"},
			{"\x83\xa4type" + removed + "\xacblock_hashes\x91\x01\xa9group_idx\xa1x", "bad_field"},
			{"\x82\xa4type\xabBlockStored\xaaextra_keys\x01", "bad_field"},
			{"\x82\xa4type\xabBlockStored\xb1parent_block_hash\xc3", "bad_field"},
		} {
			s.send(uint64(i), []byte("\x92\x00\x91"+test.event))
			want["skipped_events_total:"+test.word]++
			gather(t, reg, kvcache.NamespaceKvtap).check(t, want)
		}
		const name = "skipped_events_total"
		if got := gather(t, reg, kvcache.NamespaceKvtap); got.sum(name) != want.sum(name) {
			t.Errorf("skipped events %v, want %v", got, want)
		}
	})
}

func TestAHandlerThatOutlivesItsClientMakesNoSeries(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{kvcache.NamespaceKvtap, kvcache.NamespaceAIBrix} {
		t.Run(namespace, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				reg := prometheus.NewPedanticRegistry()
				config := n.metered(reg, namespace)
				s := n.stage()
				release := make(chan struct{})
				h := events{fail: func(int) error {
					<-release
					return errors.New("late")
				}}
				c := n.client(config, &h)
				synctest.Wait()
				s.send(0, stored(1))
				var stop *kvcache.StopError
				if err := c.Stop(); !errors.As(err, &stop) {
					t.Fatalf("Stop: %v", err)
				}
				ofEngines := func() figures { return gather(t, reg, namespace).ofEngines(namespace) }
				if left := ofEngines(); len(left) > 0 {
					t.Errorf("left after Stop: %v", left)
				}
				// Its calls and those of another client would overlap.
				if err := kvcache.NewZMQClient(config, &events{}).Start(); !errors.Is(err, kvcache.ErrDuplicateClient) {
					t.Errorf("a client while the handler of the last one runs: %v", err)
				}
				close(release)
				synctest.Wait()
				if left := ofEngines(); len(left) > 0 {
					t.Errorf("left when the handler had ended: %v", left)
				}
				n.client(config, &events{})
				synctest.Wait()
				ofEngines().check(t, figures{"connection_status": 1, "errors_total:handle_event": 0})
			})
		})
	}
}

func TestMetricsWithoutARegistryDoNothing(t *testing.T) {
	t.Parallel()
	var m *kvcache.ZMQClientMetrics
	use(m)
	m.Delete()
	m.Delete()
}

// use calls every method but Delete.
func use(m *kvcache.ZMQClientMetrics) {
	m.IncrementConnectionCount()
	m.IncrementDisconnectionCount()
	m.IncrementReconnectAttempts()
	m.IncrementEventCount(string(kvcache.EventTypeBlockRemoved))
	m.IncrementEventCount("nonsense")
	m.RecordEventProcessingLatency(time.Millisecond)
	m.IncrementMissedEvents(2)
	m.IncrementMissedEvents(-1)
	m.IncrementReplayCount()
	m.IncrementReplaySuccess()
	m.IncrementReplayFailure()
	m.IncrementErrorCount("decode")
	m.IncrementErrorCount("of my own")
	m.IncrementErrorCount("")
	m.UpdateLastSequenceID(7)
}

func TestInitializeMetricsIsIdempotent(t *testing.T) { // not parallel: it is about the process's default registry
	before := kvcache.NewZMQClientMetrics("before")
	use(before)
	before.Delete()
	for range 2 {
		if err := kvcache.InitializeMetrics(); err != nil {
			t.Fatal(err)
		}
	}
	m := kvcache.NewZMQClientMetrics("pod")
	use(m)
	again := kvcache.NewZMQClientMetrics("pod")
	use(again)
	now := func() figures { return gather(t, prometheus.DefaultGatherer, kvcache.NamespaceKvtap) }
	observed := now()["event_processing_duration_seconds"]
	now().check(t, figures{
		"connections_total": 2, "disconnections_total": 2, "connection_status": 0, "reconnect_attempts_total": 2,
		"events_received_total:BlockRemoved": 2, "events_processed_total:BlockRemoved": 2, "missed_events_total": 4,
		"replay_requests_total": 2, "replay_success_total": 2, "replay_failures_total": 2, "last_sequence_id": 7,
		"errors_total:decode": 2, "errors_total:of my own": 2, "errors_total:other": 2,
	})
	m.Delete()
	use(m)
	use(again)
	if left := now().ofEngines(kvcache.NamespaceKvtap); len(left) > 0 {
		t.Errorf("left after Delete: %v", left)
	}
	// What was deleted does not take its successor along.
	after := kvcache.NewZMQClientMetrics("pod")
	m.Delete()
	again.Delete()
	use(after)
	now().check(t, figures{
		"connections_total": 1, "errors_total:decode": 1, "event_processing_duration_seconds": observed + 3,
	})
	after.Delete()
	if left := now().ofEngines(kvcache.NamespaceKvtap); len(left) > 0 {
		t.Errorf("left after Delete: %v", left)
	}
}

func TestCountingAllocatesNothing(t *testing.T) { // not parallel: allocations of other tests would count
	if err := kvcache.InitializeMetrics(); err != nil {
		t.Fatal(err)
	}
	m := kvcache.NewZMQClientMetrics("pod that allocates nothing")
	defer m.Delete()
	use(m)
	if n := testing.AllocsPerRun(100, func() { use(m) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// refuser registers so many collectors and no more.
type refuser struct {
	*prometheus.Registry
	n int
}

func (r *refuser) Register(c prometheus.Collector) error {
	if r.n--; r.n < 0 {
		return fmt.Errorf("full")
	}
	return r.Registry.Register(c)
}

// unhashable is a Registerer that cannot be compared.
type unhashable struct {
	*prometheus.Registry
	_ []int
}

func TestStartReportsARegistererThatFails(t *testing.T) {
	t.Parallel()
	r := &refuser{prometheus.NewRegistry(), 20}
	config := kvcache.DefaultZMQClientConfig("pod", "127.0.0.1", "m")
	config.Registerer = r
	if err := kvcache.NewZMQClient(config, &events{}).Start(); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("Start: %v", err)
	}
	// Nothing is left behind that would keep a later client from registering the same.
	r.n = math.MaxInt
	m := kvcache.NewZMQClient(config, &events{})
	if err := m.Start(); err != nil {
		t.Errorf("Start with a Registerer that has recovered: %v", err)
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	config.Registerer = unhashable{Registry: prometheus.NewRegistry()}
	if err := kvcache.NewZMQClient(config, &events{}).Start(); err == nil || !strings.Contains(err.Error(), "comparable") {
		t.Errorf("Start: %v", err)
	}
}
