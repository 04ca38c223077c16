// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metricsNamespace comes before kvcache_zmq_ in every metric's name.
const metricsNamespace = "kvtap"

// The values of the error_type label.
const (
	errorConnection    = "connection"     // connecting or the handshake failed, or a connection broke
	errorConsumeEvents = "consume_events" // a message that is no batch with a number
	errorDecode        = "decode"         // a payload that is no batch
	errorHandleEvent   = "handle_event"   // the handler returned an error or panicked
	errorReplay        = "replay"         // a replay without a valid answer
)

var eventTypes = []EventType{EventTypeBlockStored, EventTypeBlockRemoved, EventTypeAllCleared}

// collectors holds the metrics of all clients of one Registerer.
type collectors struct {
	connections, disconnections, reconnects    *prometheus.CounterVec
	received, processed                        *prometheus.CounterVec // by event_type too
	processing                                 prometheus.Histogram   // of all engines: one each would cost too much
	missed, burned, duplicates, replayed       *prometheus.CounterVec
	replayRequests, replaySuccess, replayFails *prometheus.CounterVec
	errors                                     *prometheus.CounterVec // by error_type too
	resets                                     *prometheus.CounterVec // by reason too
	skipped                                    *prometheus.CounterVec
	status, lastSequence                       *prometheus.GaugeVec

	mu     sync.Mutex
	owners map[metricsKey]bool // engines that have a running client
}

type metricsKey struct {
	pod  string
	rank int
}

// registered finds the collectors of a Registerer again, so that every client of it shares them.
var registered struct {
	sync.Mutex
	by            map[prometheus.Registerer]*collectors
	isInitialized bool // InitializeMetrics was called
}

// InitializeMetrics registers the metrics with Prometheus' default registry, where clients without a Registerer of
// their own then report. It may be called again, without effect.
func InitializeMetrics() error {
	_, err := collectorsOf(prometheus.DefaultRegisterer)
	if err != nil {
		return err
	}
	registered.Lock()
	registered.isInitialized = true
	registered.Unlock()
	return nil
}

// collectorsOf returns the collectors registered with reg, registering them first if need be. A nil reg means the
// default registry once InitializeMetrics was called, and no metrics (nil) before.
func collectorsOf(reg prometheus.Registerer) (*collectors, error) {
	registered.Lock()
	defer registered.Unlock()
	if reg == nil {
		if !registered.isInitialized {
			return nil, nil
		}
		reg = prometheus.DefaultRegisterer
	}
	if !reflect.ValueOf(reg).Comparable() {
		return nil, fmt.Errorf("kvcache: a Registerer must be comparable, such as a pointer: %T", reg)
	}
	if c := registered.by[reg]; c != nil {
		return c, nil
	}
	c, all := newCollectors()
	for i, collector := range all {
		if err := reg.Register(collector); err != nil {
			for _, done := range all[:i] {
				reg.Unregister(done)
			}
			return nil, fmt.Errorf("kvcache: cannot register metrics (clients of one registry need the same Registerer "+
				"value): %w", err)
		}
	}
	if registered.by == nil {
		registered.by = make(map[prometheus.Registerer]*collectors)
	}
	registered.by[reg] = c
	return c, nil
}

func newCollectors() (*collectors, []prometheus.Collector) {
	var all []prometheus.Collector
	add := func(c prometheus.Collector) { all = append(all, c) }
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "kvcache_zmq_" + name, Help: help,
		}, append([]string{"pod_key", "rank"}, labels...))
		add(v)
		return v
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: metricsNamespace, Name: "kvcache_zmq_" + name, Help: help,
		}, []string{"pod_key", "rank"})
		add(v)
		return v
	}
	c := &collectors{
		connections:    counter("connections_total", "Connections to the engine's events that were established."),
		disconnections: counter("disconnections_total", "Connections to the engine's events that were lost."),
		reconnects:     counter("reconnect_attempts_total", "Attempts to connect after the first."),
		received:       counter("events_received_total", "Events that were decoded.", "event_type"),
		processed:      counter("events_processed_total", "Events that the handler took without an error.", "event_type"),
		processing: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: metricsNamespace,
			Name:      "kvcache_zmq_event_processing_duration_seconds",
			Help:      "Time that the handler took, per event or, if it takes batches, per batch.",
			Buckets:   prometheus.ExponentialBuckets(1e-6, 4, 12), // 1 us to 4 s
		}),
		missed:         counter("missed_events_total", "Batches found missing in the live stream; replays may bring them."),
		burned:         counter("burned_sequences_total", "Sequence numbers that the engine took and never sent."),
		duplicates:     counter("duplicate_batches_total", "Batches that came live and by replay."),
		replayed:       counter("replayed_events_total", "Events that came by replay."),
		replayRequests: counter("replay_requests_total", "Replays asked for."),
		replaySuccess:  counter("replay_success_total", "Replays that gave a valid answer."),
		replayFails:    counter("replay_failures_total", "Replays that gave no valid answer."),
		errors:         counter("errors_total", "Errors, by kind.", "error_type"),
		resets:         counter("resets_total", "Times the engine's state was started afresh, by reason.", "reason"),
		skipped:        counter("skipped_events_total", "Events that could not be read."),
		status:         gauge("connection_status", "1 while connected to the engine's events, else 0."),
		lastSequence:   gauge("last_sequence_id", "Sequence number of the last batch handed on."),
		owners:         make(map[metricsKey]bool),
	}
	add(c.processing)
	return c, all
}

// ErrDuplicateClient says that a running client already reports metrics for this pod key and rank.
var ErrDuplicateClient = errors.New("kvcache: another client runs for this pod key and rank")

// claim makes a running client the only one for its engine.
func (c *collectors) claim(key metricsKey) error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.owners[key] {
		return fmt.Errorf("%w: %s rank %d", ErrDuplicateClient, key.pod, key.rank)
	}
	c.owners[key] = true
	return nil
}

func (c *collectors) release(key metricsKey) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.owners, key)
}

// ZMQClientMetrics counts what happens to one engine's stream. All methods work on a nil receiver and before
// InitializeMetrics; they then count nothing.
type ZMQClientMetrics struct {
	from *collectors
	key  metricsKey

	connections, disconnections, reconnects    prometheus.Counter
	received, processed                        [4]prometheus.Counter // by event.Type
	processing                                 prometheus.Observer
	missed, burned, duplicates, replayed       prometheus.Counter
	replayRequests, replaySuccess, replayFails prometheus.Counter
	skipped                                    prometheus.Counter
	status, lastSequence                       prometheus.Gauge
}

// NewZMQClientMetrics returns the metrics of rank 0 of a pod, in the default registry. Clients make their own.
func NewZMQClientMetrics(podKey string) *ZMQClientMetrics {
	c, err := collectorsOf(nil)
	if err != nil {
		c = nil // InitializeMetrics has reported it
	}
	return c.metrics(metricsKey{pod: podKey})
}

func (c *collectors) metrics(key metricsKey) *ZMQClientMetrics {
	if c == nil {
		return nil
	}
	l := key.labels()
	m := &ZMQClientMetrics{
		from: c, key: key,
		connections:    c.connections.WithLabelValues(l...),
		disconnections: c.disconnections.WithLabelValues(l...),
		reconnects:     c.reconnects.WithLabelValues(l...),
		processing:     c.processing,
		missed:         c.missed.WithLabelValues(l...),
		burned:         c.burned.WithLabelValues(l...),
		duplicates:     c.duplicates.WithLabelValues(l...),
		replayed:       c.replayed.WithLabelValues(l...),
		replayRequests: c.replayRequests.WithLabelValues(l...),
		replaySuccess:  c.replaySuccess.WithLabelValues(l...),
		replayFails:    c.replayFails.WithLabelValues(l...),
		skipped:        c.skipped.WithLabelValues(l...),
		status:         c.status.WithLabelValues(l...),
		lastSequence:   c.lastSequence.WithLabelValues(l...),
	}
	for i, t := range eventTypes {
		m.received[i+1] = c.received.WithLabelValues(append(l, string(t))...)
		m.processed[i+1] = c.processed.WithLabelValues(append(l, string(t))...)
	}
	return m
}

// labels returns the label values of the engine, with no room behind them, so that each append copies.
func (k metricsKey) labels() []string {
	l := []string{k.pod, strconv.Itoa(k.rank)}
	return l[:len(l):len(l)]
}

// eventIndex returns the place of a type in ZMQClientMetrics.received, or 0 for none.
func eventIndex(t EventType) int {
	for i, known := range eventTypes {
		if t == known {
			return i + 1
		}
	}
	return 0
}

// IncrementConnectionCount counts a connection that was established.
func (m *ZMQClientMetrics) IncrementConnectionCount() {
	if m != nil {
		m.connections.Inc()
		m.status.Set(1)
	}
}

// IncrementDisconnectionCount counts a connection that was lost.
func (m *ZMQClientMetrics) IncrementDisconnectionCount() {
	if m != nil {
		m.disconnections.Inc()
		m.status.Set(0)
	}
}

// IncrementReconnectAttempts counts an attempt to connect again.
func (m *ZMQClientMetrics) IncrementReconnectAttempts() {
	if m != nil {
		m.reconnects.Inc()
	}
}

// IncrementEventCount counts an event of the given type as received and processed.
func (m *ZMQClientMetrics) IncrementEventCount(eventType string) {
	if m == nil {
		return
	}
	if i := eventIndex(EventType(eventType)); i > 0 {
		m.received[i].Inc()
		m.processed[i].Inc()
	}
}

// RecordEventProcessingLatency records how long the handler took.
func (m *ZMQClientMetrics) RecordEventProcessingLatency(d time.Duration) {
	if m != nil {
		m.processing.Observe(d.Seconds())
	}
}

// IncrementMissedEvents counts batches found missing. A negative count is ignored.
func (m *ZMQClientMetrics) IncrementMissedEvents(count int64) {
	if m != nil && count > 0 {
		m.missed.Add(float64(count))
	}
}

// IncrementReplayCount counts a replay that was asked for.
func (m *ZMQClientMetrics) IncrementReplayCount() {
	if m != nil {
		m.replayRequests.Inc()
	}
}

// IncrementReplaySuccess counts a replay with a valid answer.
func (m *ZMQClientMetrics) IncrementReplaySuccess() {
	if m != nil {
		m.replaySuccess.Inc()
	}
}

// IncrementReplayFailure counts a replay without one.
func (m *ZMQClientMetrics) IncrementReplayFailure() {
	if m != nil {
		m.replayFails.Inc()
	}
}

// IncrementErrorCount counts an error of the given kind.
func (m *ZMQClientMetrics) IncrementErrorCount(errorType string) {
	if m != nil {
		m.from.errors.WithLabelValues(append(m.key.labels(), errorType)...).Inc()
	}
}

// UpdateLastSequenceID records the number of the last batch handed on.
func (m *ZMQClientMetrics) UpdateLastSequenceID(seq int64) {
	if m != nil {
		m.lastSequence.Set(float64(seq))
	}
}

func (m *ZMQClientMetrics) countReset(reason Reason) {
	if m != nil {
		m.from.resets.WithLabelValues(append(m.key.labels(), string(reason))...).Inc()
	}
}

// countNumbers counts what a decision found out about sequence numbers.
func (m *ZMQClientMetrics) countNumbers(d decision) {
	if m == nil {
		return
	}
	if d.missed > 0 {
		m.missed.Add(float64(d.missed))
	}
	if d.burned > 0 {
		m.burned.Add(float64(d.burned))
	}
	if d.duplicate {
		m.duplicates.Inc()
	}
}

// Delete removes this engine's metrics from the registry. It may be called again, without effect.
func (m *ZMQClientMetrics) Delete() {
	if m == nil {
		return
	}
	engine := prometheus.Labels{"pod_key": m.key.pod, "rank": strconv.Itoa(m.key.rank)}
	c := m.from
	for _, v := range []interface {
		DeletePartialMatch(prometheus.Labels) int
	}{
		c.connections, c.disconnections, c.reconnects, c.received, c.processed, c.missed, c.burned, c.duplicates,
		c.replayed, c.replayRequests, c.replaySuccess, c.replayFails, c.errors, c.resets, c.skipped, c.status,
		c.lastSequence,
	} {
		v.DeletePartialMatch(engine)
	}
}
