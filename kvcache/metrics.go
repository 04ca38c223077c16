// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The namespaces of metrics: the first word of every name.
const (
	NamespaceKvtap  = "kvtap"
	NamespaceAIBrix = "aibrix" // for dashboards made for AIBrix
)

// The values of the error_type label.
const (
	errorConnection    = "connection"     // the first attempt to connect failed, a handshake, or a connection broke
	errorReconnect     = "reconnect"      // an attempt to connect after the first failed
	errorConsumeEvents = "consume_events" // a message that is no batch with a number
	errorDecode        = "decode"         // a payload that is no batch
	errorHandleEvent   = "handle_event"   // the handler returned an error or panicked
	errorReplay        = "replay"         // a replay without a valid answer
)

// errorOfAttempt is the error_type of an attempt to connect that failed; the first is number 0.
func errorOfAttempt(attempt int) string {
	if attempt == 0 {
		return errorConnection
	}
	return errorReconnect
}

var (
	eventTypes = []EventType{EventTypeBlockStored, EventTypeBlockRemoved, EventTypeAllCleared}
	errorTypes = []string{
		errorConnection, errorReconnect, errorConsumeEvents, errorDecode, errorHandleEvent, errorReplay,
	}
	// resetReasons are the reasons that always have a series of their own, however many a caller makes up.
	resetReasons = []string{
		string(ReasonStart), string(ReasonRestart), string(ReasonHistoryLost), string(ReasonLateStart),
		string(ReasonUnreadable), string(ReasonGap), string(ReasonReconnect), string(ReasonCaller), string(ReasonResync),
	}
)

// The values of the reason label of skipped events.
const (
	skipUnknownType  = "unknown_type"  // an event of a type that no engine known here sends
	skipNoType       = "no_type"       // the type is missing, or is no text
	skipNotAnEvent   = "not_an_event"  // neither an array nor a map
	skipMissingField = "missing_field" // too short an array, or a map without hashes
	skipBadField     = "bad_field"     // a field whose value is of another type than it should be
	skipTruncated    = "truncated"
)

var skipReasons = []string{
	skipUnknownType, skipNoType, skipNotAnEvent, skipMissingField, skipBadField, skipTruncated,
}

// skipWord returns the label for a reason of event.Skip, which is a text for people.
func skipWord(reason string) string {
	switch reason {
	case "unknown event type":
		return skipUnknownType
	case "type: missing", "type: not a string":
		return skipNoType
	case "neither an array nor a map":
		return skipNotAnEvent
	case "too few fields", "block_hashes: missing":
		return skipMissingField
	case "truncated":
		return skipTruncated
	}
	if strings.Contains(reason, ": not a") {
		return skipBadField
	}
	return labelOther
}

const (
	// labelOther stands for the values that a label has no room for.
	labelOther = "other"
	// maxStrange is how many values that are not known here a label may have for one engine: callers name reasons.
	maxStrange = 32
)

// maxLag bounds what is recorded: an age of years is a clock, and would spoil the mean of all engines for ever.
const maxLag = time.Hour

// lagBuckets are in seconds. Below 1 ms clocks of two hosts say nothing.
var lagBuckets = []float64{0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60}

// collectors holds the metrics of all clients of one Registerer in one namespace.
type collectors struct {
	namespace string
	claims    *claims // of the Registerer

	connections, disconnections, reconnects    *prometheus.CounterVec
	received, processed                        *prometheus.CounterVec // by event_type too
	missed, burned, duplicates, replayed       *prometheus.CounterVec
	replayRequests, replaySuccess, replayFails *prometheus.CounterVec
	errors                                     *prometheus.CounterVec // by error_type too
	resets, skipped                            *prometheus.CounterVec // by reason too
	status, lastSequence, pending              *prometheus.GaugeVec
	streamState, streamBound                   *prometheus.GaugeVec
	processing, lag                            *prometheus.HistogramVec

	// perEngine are those with the labels of the engine and no others.
	perEngine []interface {
		DeleteLabelValues(values ...string) bool
	}

	mu      sync.Mutex
	engines map[engineLabels]*ZMQClientMetrics // those that were not deleted
}

// metricsKey names an engine.
type metricsKey struct {
	pod  string
	rank int
}

// engineLabels are the values of an engine's labels in one namespace. In that of AIBrix rank is empty.
type engineLabels struct{ pod, rank string }

// labels returns the engine's labels. Prometheus panics at text that is not UTF-8.
func (k metricsKey) labels(namespace string) engineLabels {
	l := engineLabels{strings.ToValidUTF8(k.pod, "\uFFFD"), strconv.Itoa(k.rank)}
	if namespace == NamespaceAIBrix {
		if k.rank > 0 {
			l.pod += ":" + l.rank
		}
		l.rank = ""
	}
	return l
}

// values returns the values in the order of labelNames, with no room behind them, so that each append copies.
func (l engineLabels) values() []string {
	if l.rank == "" {
		return []string{l.pod}
	}
	return []string{l.pod, l.rank}
}

func labelNames(namespace string) []string {
	if namespace == NamespaceAIBrix {
		return []string{"pod_key"}
	}
	return []string{"pod_key", "rank"}
}

// registered finds the collectors of a Registerer again, so that every client of it shares them.
var registered struct {
	sync.Mutex
	by            map[prometheus.Registerer]*registry
	isInitialized bool // InitializeMetrics was called
}

// registry is what one Registerer knows of.
type registry struct {
	claims      claims
	byNamespace map[string]*collectors
}

// InitializeMetrics registers the metrics with Prometheus' default registry, where clients without a Registerer of
// their own then report. It may be called again, without effect.
func InitializeMetrics() error {
	_, err := collectorsOf(prometheus.DefaultRegisterer, NamespaceKvtap)
	if err != nil {
		return err
	}
	registered.Lock()
	registered.isInitialized = true
	registered.Unlock()
	return nil
}

// collectorsOf returns the collectors registered with reg in a namespace, registering them first if need be. A nil reg
// means the default registry once InitializeMetrics was called, and no metrics (nil) before.
func collectorsOf(reg prometheus.Registerer, namespace string) (*collectors, error) {
	if namespace == "" {
		namespace = NamespaceKvtap
	}
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
	r := registered.by[reg]
	if r == nil {
		r = &registry{byNamespace: make(map[string]*collectors)}
	}
	if c := r.byNamespace[namespace]; c != nil {
		return c, nil
	}
	c, all := newCollectors(namespace)
	c.claims = &r.claims
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
		registered.by = make(map[prometheus.Registerer]*registry)
	}
	registered.by[reg] = r
	r.byNamespace[namespace] = c
	return c, nil
}

func newCollectors(namespace string) (*collectors, []prometheus.Collector) {
	c := &collectors{namespace: namespace, engines: make(map[engineLabels]*ZMQClientMetrics)}
	var all []prometheus.Collector
	name := func(s string) string { return prometheus.BuildFQName(namespace, "kvcache_zmq", s) }
	engine := labelNames(namespace)
	counterBy := func(s, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name(s), Help: help}, append(engine, labels...))
		all = append(all, v)
		return v
	}
	counter := func(s, help string) *prometheus.CounterVec {
		v := counterBy(s, help)
		c.perEngine = append(c.perEngine, v)
		return v
	}
	gauge := func(s, help string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name(s), Help: help}, engine)
		all = append(all, v)
		c.perEngine = append(c.perEngine, v)
		return v
	}
	histogram := func(s, help string, buckets []float64) *prometheus.HistogramVec {
		// One for each engine would cost more than all the rest together.
		var labels []string
		if namespace == NamespaceAIBrix {
			labels = engine
		}
		v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name(s), Help: help, Buckets: buckets}, labels)
		all = append(all, v)
		if len(labels) > 0 {
			c.perEngine = append(c.perEngine, v)
		}
		return v
	}
	c.connections = counter("connections_total", "Connections to the engine's events that were established.")
	c.disconnections = counter("disconnections_total", "Connections to the engine's events that were lost.")
	c.reconnects = counter("reconnect_attempts_total", "Attempts to connect after the first.")
	c.received = counterBy("events_received_total", "Events that were decoded.", "event_type")
	c.processed = counterBy("events_processed_total", "Events that the handler took without an error.", "event_type")
	c.processing = histogram("event_processing_duration_seconds",
		"Time that the handler took, per event or, if it takes batches, per batch.",
		prometheus.ExponentialBuckets(1e-6, 4, 12)) // 1 us to 4 s
	c.lag = histogram("event_lag_seconds",
		"Age of live batches when they were received, by the engine's clock and ours.", lagBuckets)
	c.missed = counter("missed_events_total", "Batches found missing in the live stream; replays may bring them.")
	c.burned = counter("burned_sequences_total", "Sequence numbers that the engine took and never sent.")
	c.duplicates = counter("duplicate_batches_total", "Batches that came more than once.")
	c.replayed = counter("replayed_events_total", "Events that came by replay.")
	c.replayRequests = counter("replay_requests_total", "Replays asked for.")
	c.replaySuccess = counter("replay_success_total", "Replays that gave a valid answer.")
	c.replayFails = counter("replay_failures_total", "Replays that gave no valid answer.")
	c.errors = counterBy("errors_total", "Errors, by kind.", "error_type")
	c.resets = counterBy("resets_total", "Times the engine's state was started afresh, by reason.", "reason")
	c.skipped = counterBy("skipped_events_total", "Events that could not be read, by reason.", "reason")
	c.status = gauge("connection_status", "1 while connected to the engine's events, else 0.")
	c.lastSequence = gauge("last_sequence_id", "Sequence number of the last batch handed on.")
	c.pending = gauge("pending_bytes", "Memory of live batches that wait for a replay.")
	c.streamState = gauge("stream_state", "0 connecting, 1 syncing, 2 live, 3 recovering.")
	c.streamBound = gauge("stream_bound", "What the history is worth: 0 unknown, 1 at least, 2 exact.")
	return c, all
}

// The reasons for which a client's metrics cannot be told from another's.
var (
	// ErrDuplicateClient says that a running client already reports metrics for this pod key and rank.
	ErrDuplicateClient = errors.New("kvcache: another client runs for this pod key and rank")
	// ErrAmbiguousPodKey says that a running client of another pod or rank has the same labels: in the namespace of
	// AIBrix, rank 0 of "pod:1" and rank 1 of "pod" have; so have pod keys that differ only in what is not UTF-8.
	ErrAmbiguousPodKey = errors.New("kvcache: another client's metrics have the same labels")
)

// claims makes each running client of a Registerer the only one for its engine, and for its labels.
type claims struct {
	mu     sync.Mutex
	owners map[metricsKey]series
	taken  map[series]metricsKey
}

// series names the metrics of one engine in one namespace. It is zero for a client that has none.
type series struct {
	namespace string
	engine    engineLabels
}

// claim makes a running client the only one for its engine. It needs no labels if it is to have no metrics per engine.
func (c *collectors) claim(key metricsKey, noEngine bool) error {
	if c == nil {
		return nil
	}
	l := c.claims
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.owners[key]; ok {
		return fmt.Errorf("%w: %s rank %d", ErrDuplicateClient, key.pod, key.rank)
	}
	var s series
	if !noEngine {
		s = series{c.namespace, key.labels(c.namespace)}
		if owner, ok := l.taken[s]; ok {
			return fmt.Errorf("%w: %q rank %d and %q rank %d", ErrAmbiguousPodKey, key.pod, key.rank, owner.pod, owner.rank)
		}
	}
	if l.owners == nil {
		l.owners, l.taken = make(map[metricsKey]series), make(map[series]metricsKey)
	}
	l.owners[key] = s
	if !noEngine {
		l.taken[s] = key
	}
	return nil
}

func (c *collectors) release(key metricsKey) {
	if c == nil {
		return
	}
	l := c.claims
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.taken, l.owners[key])
	delete(l.owners, key)
}

// ZMQClientMetrics counts what happens to one engine's stream. All methods work on a nil receiver, before
// InitializeMetrics and after Delete; they then count nothing. They may be called from any goroutine.
type ZMQClientMetrics struct {
	from   *collectors
	engine engineLabels

	connections, disconnections, reconnects    prometheus.Counter
	received, processed                        [4]prometheus.Counter // by event.Type
	missed, burned, duplicates, replayed       prometheus.Counter
	replayRequests, replaySuccess, replayFails prometheus.Counter
	errors, resets, skipped                    words
	status, lastSequence, pending              prometheus.Gauge
	streamState, streamBound                   prometheus.Gauge
	processing, lag                            prometheus.Observer
}

// NewZMQClientMetrics returns the metrics of rank 0 of a pod, in the default registry; for one pod they are the same
// until they are deleted. Clients make their own, and delete them when they stop.
func NewZMQClientMetrics(podKey string) *ZMQClientMetrics {
	c, err := collectorsOf(nil, NamespaceKvtap)
	if err != nil {
		c = nil // InitializeMetrics has reported it
	}
	return c.metrics(metricsKey{pod: podKey}, false)
}

// metrics returns the metrics of one engine, or, with noEngine, what counts only for all engines together.
func (c *collectors) metrics(key metricsKey, noEngine bool) *ZMQClientMetrics {
	if c == nil {
		return nil
	}
	if noEngine {
		return c.shared()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	engine := key.labels(c.namespace)
	if m := c.engines[engine]; m != nil {
		return m
	}
	l := engine.values()
	m := &ZMQClientMetrics{
		from: c, engine: engine,
		connections:    c.connections.WithLabelValues(l...),
		disconnections: c.disconnections.WithLabelValues(l...),
		reconnects:     c.reconnects.WithLabelValues(l...),
		missed:         c.missed.WithLabelValues(l...),
		burned:         c.burned.WithLabelValues(l...),
		duplicates:     c.duplicates.WithLabelValues(l...),
		replayed:       c.replayed.WithLabelValues(l...),
		replayRequests: c.replayRequests.WithLabelValues(l...),
		replaySuccess:  c.replaySuccess.WithLabelValues(l...),
		replayFails:    c.replayFails.WithLabelValues(l...),
		status:         c.status.WithLabelValues(l...),
		lastSequence:   c.lastSequence.WithLabelValues(l...),
		pending:        c.pending.WithLabelValues(l...),
		streamState:    c.streamState.WithLabelValues(l...),
		streamBound:    c.streamBound.WithLabelValues(l...),
		errors:         words{vec: c.errors, engine: l, known: errorTypes},
		resets:         words{vec: c.resets, engine: l, known: resetReasons},
		skipped:        words{vec: c.skipped, engine: l, known: skipReasons},
	}
	m.processing, m.lag = c.observers(l)
	m.received[0], m.processed[0] = noCounter{}, noCounter{}
	for i, t := range eventTypes {
		m.received[i+1] = c.received.WithLabelValues(append(l, string(t))...)
		m.processed[i+1] = c.processed.WithLabelValues(append(l, string(t))...)
	}
	// A rate cannot see the first error if its series begins with it.
	for _, t := range errorTypes {
		m.errors.child(t)
	}
	c.engines[engine] = m
	return m
}

// shared returns metrics that count only for all engines together, which in the namespace of AIBrix is nothing.
func (c *collectors) shared() *ZMQClientMetrics {
	m := &ZMQClientMetrics{
		connections: noCounter{}, disconnections: noCounter{}, reconnects: noCounter{},
		missed: noCounter{}, burned: noCounter{}, duplicates: noCounter{}, replayed: noCounter{},
		replayRequests: noCounter{}, replaySuccess: noCounter{}, replayFails: noCounter{},
		status: noGauge{}, lastSequence: noGauge{}, pending: noGauge{}, streamState: noGauge{}, streamBound: noGauge{},
		processing: noObserver{}, lag: noObserver{},
	}
	for i := range m.received {
		m.received[i], m.processed[i] = noCounter{}, noCounter{}
	}
	if c.namespace != NamespaceAIBrix {
		m.processing, m.lag = c.observers(nil)
	}
	return m
}

// observers returns the histograms for an engine.
func (c *collectors) observers(engine []string) (processing, lag prometheus.Observer) {
	if c.namespace != NamespaceAIBrix {
		engine = nil
	}
	return c.processing.WithLabelValues(engine...), c.lag.WithLabelValues(engine...)
}

// Metrics that count nothing, for clients without metrics per engine. The interfaces they embed are nil: nothing is
// called but what is here.
type (
	noCounter  struct{ prometheus.Counter }
	noGauge    struct{ prometheus.Gauge }
	noObserver struct{}
)

func (noCounter) Inc()             {}
func (noCounter) Add(float64)      {}
func (noGauge) Set(float64)        {}
func (noObserver) Observe(float64) {}

// words counts by a label whose values turn up as they come. The zero words counts nothing.
type words struct {
	vec    *prometheus.CounterVec
	engine []string // the other labels' values, with no room behind them
	known  []string // values that always have their own series

	mu       sync.Mutex
	children map[string]prometheus.Counter
	strange  int // children that are not of known, nor labelOther
	deleted  bool
}

// inc counts a value.
func (w *words) inc(value string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.vec != nil && !w.deleted {
		w.child(value).Inc()
	}
}

// child returns the counter of a value, or that of labelOther where there is no room for it. Callers hold mu, or are
// alone.
func (w *words) child(value string) prometheus.Counter {
	if c := w.children[value]; c != nil {
		return c
	}
	value = strings.ToValidUTF8(value, "\uFFFD")
	switch {
	case value == "" || value == labelOther:
		value = labelOther // an empty value would be none
	case w.children[value] != nil || slices.Contains(w.known, value):
	case w.strange == maxStrange:
		value = labelOther
	default:
		w.strange++
	}
	c := w.children[value]
	if c == nil {
		if w.children == nil {
			w.children = make(map[string]prometheus.Counter)
		}
		c = w.vec.WithLabelValues(append(w.engine, value)...)
		w.children[value] = c
	}
	return c
}

// delete removes the series. None is made again.
func (w *words) delete() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deleted = true
	for value := range w.children {
		w.vec.DeleteLabelValues(append(w.engine, value)...)
	}
	w.children = nil
}

// eventIndex returns the place of a type in ZMQClientMetrics.received, or 0 for none.
func eventIndex(t EventType) int { return slices.Index(eventTypes, t) + 1 }

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

// IncrementEventCount counts an event of the given type as received and processed. Types that are no EventType are
// ignored.
func (m *ZMQClientMetrics) IncrementEventCount(eventType string) {
	if m != nil {
		i := eventIndex(EventType(eventType))
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

// IncrementErrorCount counts an error of the given kind: connection, reconnect, consume_events, decode, handle_event or
// replay. Of others the first 32 have a series each, and the rest are "other".
func (m *ZMQClientMetrics) IncrementErrorCount(errorType string) {
	if m != nil {
		m.errors.inc(errorType)
	}
}

// UpdateLastSequenceID records the number of the last batch handed on.
func (m *ZMQClientMetrics) UpdateLastSequenceID(seq int64) {
	if m != nil {
		m.lastSequence.Set(float64(seq))
	}
}

// countReset counts a reset. Reasons that callers name have a series each, up to a limit.
func (m *ZMQClientMetrics) countReset(reason Reason) {
	if m != nil {
		m.resets.inc(string(reason))
	}
}

// setPending records the bytes that live messages take while they wait for a replay.
func (m *ZMQClientMetrics) setPending(bytes int) {
	if m != nil {
		m.pending.Set(float64(bytes))
	}
}

// setStream records the condition of the stream.
func (m *ZMQClientMetrics) setStream(state State, bound Bound) {
	if m != nil {
		m.streamState.Set(float64(state))
		m.streamBound.Set(float64(bound))
	}
}

// countSkipped counts an event that could not be read, by the reason, of which event.Decode has few.
func (m *ZMQClientMetrics) countSkipped(reason string) {
	if m != nil {
		m.skipped.inc(skipWord(reason))
	}
}

// observeLag records how old a live batch was when it was received. It is negative if the engine's clock is ahead of
// ours, which says no more than that the batch is young.
func (m *ZMQClientMetrics) observeLag(d time.Duration) {
	if m != nil {
		m.lag.Observe(min(max(d, 0), maxLag).Seconds())
	}
}

// countNumbers counts what a decision found out about sequence numbers.
func (m *ZMQClientMetrics) countNumbers(d *decision) {
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

// Delete removes this engine's metrics from the registry, for good: what is counted afterwards shows nowhere. It may be
// called again, without effect, also when others have been made for the same engine meanwhile.
func (m *ZMQClientMetrics) Delete() {
	if m == nil || m.from == nil {
		return
	}
	c := m.from
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.engines[m.engine] != m {
		return
	}
	delete(c.engines, m.engine)
	l := m.engine.values()
	for _, v := range c.perEngine {
		v.DeleteLabelValues(l...)
	}
	for _, t := range eventTypes {
		c.received.DeleteLabelValues(append(l, string(t))...)
		c.processed.DeleteLabelValues(append(l, string(t))...)
	}
	m.errors.delete()
	m.resets.delete()
	m.skipped.delete()
}
