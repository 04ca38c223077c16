// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// gather returns the values of a registry's counters and gauges by name and last label, sums for histograms.
func gather(t *testing.T, reg prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := []string{strings.TrimPrefix(f.GetName(), "kvtap_kvcache_zmq_")}
			for _, l := range m.GetLabel() {
				if l.GetName() != "pod_key" && l.GetName() != "rank" {
					name = append(name, l.GetValue())
				}
			}
			values[strings.Join(name, ":")] += m.GetCounter().GetValue() + m.GetGauge().GetValue() +
				float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

func TestEveryMetricMovesAndNoneIsLeftAfterStop(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		reg := prometheus.NewRegistry()
		config := n.config()
		config.Registerer = reg
		h := events{fail: func(i int) error {
			if i == 0 {
				return errors.New("no")
			}
			return nil
		}}
		c := n.client(config, &h)
		time.Sleep(time.Second) // connection refused
		e := n.engine(nil)
		publish(t, e, 1)
		time.Sleep(6 * time.Second)
		publish(t, e, 2)
		for _, payload := range [][]byte{
			encode(
				event.Event{Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{2}},
				event.Event{Type: event.AllBlocksCleared, Map: true},
			),
			[]byte("\x92\x00\x91\x91\xa3New"), // an event of unknown type
			[]byte("junk"),
		} {
			if err := e.Publish(payload); err != nil {
				t.Fatal(err)
			}
		}
		if err := e.PublishAt(7, stored(3)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		o := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		time.Sleep(10 * time.Second)
		publish(t, o, 4)

		got := gather(t, reg)
		for name, want := range map[string]float64{
			"connections_total":                       2,
			"disconnections_total":                    1,
			"events_received_total:BlockStored":       4,
			"events_received_total:BlockRemoved":      1,
			"events_received_total:AllBlocksCleared":  1,
			"events_processed_total:BlockStored":      3,
			"events_processed_total:BlockRemoved":     1,
			"events_processed_total:AllBlocksCleared": 1,
			"event_processing_duration_seconds":       6,
			"missed_events_total":                     2,
			"burned_sequences_total":                  2,
			"duplicate_batches_total":                 5,
			"replayed_events_total":                   2,
			"replay_requests_total":                   8,
			"replay_success_total":                    5,
			"replay_failures_total":                   3,
			"errors_total:handle_event":               1,
			"errors_total:decode":                     1,
			"errors_total:replay":                     3,
			"resets_total:start":                      1,
			"resets_total:restart":                    1,
			"resets_total:unreadable":                 1,
			"skipped_events_total":                    1,
			"connection_status":                       1,
			"last_sequence_id":                        0,
		} {
			if got[name] != want {
				t.Errorf("%s is %v, want %v", name, got[name], want)
			}
			delete(got, name)
		}
		for _, name := range []string{"reconnect_attempts_total", "errors_total:connection"} {
			if got[name] < 2 {
				t.Errorf("%s is %v", name, got[name])
			}
			delete(got, name)
		}
		if len(got) > 0 {
			t.Errorf("metrics that no test moves: %v", got)
		}

		// One client per pod and rank.
		if err := kvcache.NewZMQClient(config, &h).Start(); !errors.Is(err, kvcache.ErrDuplicateClient) {
			t.Errorf("a second client: %v", err)
		}
		other := *config
		other.Rank = 1
		rank1 := n.client(&other, &h)
		if err := errors.Join(c.Stop(), rank1.Stop()); err != nil {
			t.Fatal(err)
		}
		left := gather(t, reg)
		delete(left, "event_processing_duration_seconds") // of all engines together
		if len(left) > 0 {
			t.Errorf("left after Stop: %v", left)
		}
		n.client(config, &h) // the place is free again
	})
}

func TestMetricsWithoutARegistryDoNothing(t *testing.T) {
	t.Parallel()
	var m *kvcache.ZMQClientMetrics
	use(m)
}

// use calls every method.
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
	m.UpdateLastSequenceID(7)
	m.Delete()
	m.Delete()
}

func TestInitializeMetricsIsIdempotent(t *testing.T) { // not parallel: it is about the process's default registry
	use(kvcache.NewZMQClientMetrics("before"))
	for range 2 {
		if err := kvcache.InitializeMetrics(); err != nil {
			t.Fatal(err)
		}
	}
	m := kvcache.NewZMQClientMetrics("pod")
	m.IncrementEventCount(string(kvcache.EventTypeBlockStored))
	m.UpdateLastSequenceID(7)
	kvcache.NewZMQClientMetrics("pod").IncrementEventCount(string(kvcache.EventTypeBlockStored))
	got := gather(t, prometheus.DefaultGatherer)
	if got["events_received_total:BlockStored"] != 2 || got["last_sequence_id"] != 7 {
		t.Errorf("metrics %v", got)
	}
	use(m)
	for name := range gather(t, prometheus.DefaultGatherer) {
		if slices.Contains([]string{"connections_total", "last_sequence_id"}, name) {
			t.Errorf("%s is left after Delete", name)
		}
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
	r := &refuser{prometheus.NewRegistry(), 3}
	config := kvcache.DefaultZMQClientConfig("pod", "127.0.0.1", "m")
	config.Registerer = r
	if err := kvcache.NewZMQClient(config, &events{}).Start(); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("Start: %v", err)
	}
	if left := gather(t, r.Registry); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	config.Registerer = unhashable{Registry: prometheus.NewRegistry()}
	if err := kvcache.NewZMQClient(config, &events{}).Start(); err == nil || !strings.Contains(err.Error(), "comparable") {
		t.Errorf("Start: %v", err)
	}
}
