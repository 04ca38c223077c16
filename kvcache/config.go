// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// Defaults of ZMQClientConfig.
const (
	DefaultPubPort    = 5557 // vLLM's PUB socket
	DefaultRouterPort = 5558 // vLLM's replay ROUTER, by convention

	DefaultPollTimeout       = 100 * time.Millisecond
	DefaultReplayTimeout     = 5 * time.Second
	DefaultReconnectInterval = 1 * time.Second
	MaxReconnectInterval     = 30 * time.Second
	ReconnectBackoffFactor   = 2.0

	DefaultStopTimeout    = 5 * time.Second
	DefaultVerifyInterval = 30 * time.Second
	DefaultMaxMemory      = 64 << 20 // bytes
	DefaultPingInterval   = 5 * time.Second
	DefaultPingTimeout    = 4 * time.Second
)

// ZMQClientConfig says where one engine publishes and how patient to be with it.
type ZMQClientConfig struct {
	// PodKey names the engine in events, logs and metrics, such as "namespace/pod".
	PodKey string
	// PodIP is the engine's address, IPv4 or IPv6. Not needed where PubEndpoint is set.
	PodIP string
	// ModelName is set on every event.
	ModelName string

	// PubPort is the TCP port of the engine's PUB socket. Data-parallel rank r publishes on its base port + r.
	PubPort int
	// RouterPort is the TCP port of the engine's replay ROUTER.
	RouterPort int

	// PollTimeout is accepted for callers that set it and has no effect: nothing polls.
	PollTimeout time.Duration
	// ReplayTimeout is how long a replay may go without a message before it counts as failed; once it has brought a batch,
	// 1s at most, after which it is asked for again from there. Zero means 5s.
	ReplayTimeout time.Duration
	// ReconnectDelay is the upper limit of the first wait before a reconnect; it doubles up to 30s. Zero means 1s.
	ReconnectDelay time.Duration

	// PubEndpoint, if set, replaces PodIP and PubPort: tcp://host:port, tcp://[ipv6]:port or ipc://path.
	PubEndpoint string
	// ReplayEndpoint, if set, replaces PodIP and RouterPort. Where PubEndpoint is set and this is not, there are no
	// replays.
	ReplayEndpoint string
	// NoReplay says that the engine has no replay endpoint. Then a lost connection cannot be made good.
	NoReplay bool
	// Listen makes the client wait on PubEndpoint for the engine to connect, which is what vLLM does for an endpoint
	// without a wildcard. One engine at a time: while its connection lives, others are refused; a new connection from
	// the same host takes the place of one that has said nothing for 10 seconds.
	Listen bool
	// Topic is the prefix of the topics to subscribe to. Empty means all. A replay of another topic counts as failed.
	Topic string
	// Rank is the data-parallel rank that publishes on this port. It stands in where batches do not say theirs.
	Rank int
	// FromSequence is the first sequence number wanted; what the engine sends below it is left out, even after a restart
	// that the client has not seen. Zero asks for everything the engine still has, which is what an exact state needs.
	FromSequence uint64

	// VerifyInterval is how long nothing may come before the engine is asked whether something was lost: a batch that
	// was the last for a while would be missed by no other. Zero means 30s, a negative value never.
	VerifyInterval time.Duration

	// HistoryLost says what to do when batches are missing on an unbroken connection that the engine no longer has.
	HistoryLost Policy

	// PingInterval is how often a PING goes to an engine that speaks ZMTP 3.1, PingTimeout how long nothing may come
	// after one. An engine that is stopped is noticed after both at the latest. Zero means 5s and 4s; a negative
	// PingInterval sends none, and leaves it to TCP keepalive to find a vanished host.
	PingInterval, PingTimeout time.Duration

	// MaxMemory bounds the memory of this client in bytes: an eighth for live messages that are held during a replay
	// (beyond it they are dropped, and fetched by another replay), the rest for the message in hand, as bytes and
	// decoded. A client uses so much only if its engine sends what no engine does; an idle one takes about 200 KiB. Zero
	// means 64 MiB.
	MaxMemory int
	// MaxMessage limits one message in bytes. A longer one is read past, and counts as a batch that cannot be read.
	// Zero means a 32nd of MaxMemory, which is also the most: 2 MiB, 400,000 tokens in one step of the engine.
	MaxMessage int
	// HoldBudget is what the held messages of several clients may take together. Nil means one of 256 MiB that all such
	// clients of the process share.
	HoldBudget *HoldBudget
	// ReplayLimiter says how many clients may have a replay at once. Nil means 8, over all such clients of the process.
	ReplayLimiter ReplayLimiter

	// StopTimeout is how long Stop waits for a handler call that is running. Zero means 5s.
	StopTimeout time.Duration

	// Logger receives changes of state; nil means silence.
	Logger *slog.Logger
	// Registerer receives this client's metrics. All clients must be given the same value, not one wrapper each. Nil
	// means what InitializeMetrics registered with the default registry, and no metrics if that was never called. What is
	// registered stays so for the life of the process, and with it the Registerer; a client's series go with Stop.
	Registerer prometheus.Registerer
	// MetricsNamespace is the first word of the metrics' names: "kvtap", which empty means, or "aibrix" for dashboards
	// made for AIBrix. There the rank has no label of its own but ends the pod_key, as ":1".
	MetricsNamespace string
	// NoEngineMetrics leaves out the metrics that have a series per engine. With thousands of engines those cost money;
	// Stats has the totals.
	NoEngineMetrics bool

	// Dial and ListenFunc replace the network, for tests. Nil means the real one.
	Dial       func(ctx context.Context, network, address string) (net.Conn, error)
	ListenFunc func(ctx context.Context, network, address string) (net.Listener, error)
}

// DefaultZMQClientConfig returns the configuration of an engine at vLLM's usual ports.
func DefaultZMQClientConfig(podKey, podIP, modelName string) *ZMQClientConfig {
	return &ZMQClientConfig{
		PodKey:         podKey,
		PodIP:          podIP,
		ModelName:      modelName,
		PubPort:        DefaultPubPort,
		RouterPort:     DefaultRouterPort,
		PollTimeout:    DefaultPollTimeout,
		ReplayTimeout:  DefaultReplayTimeout,
		ReconnectDelay: DefaultReconnectInterval,
	}
}

// Shares of MaxMemory. A decoded message takes up to 20 times its bytes (event.Decode says how), and there are two read
// buffers and the last payload.
const (
	messageShare = 32
	holdShare    = 8
	minMemory    = 1 << 20
)

func (c *ZMQClientConfig) maxMessage() int {
	return orDefault(c.MaxMessage, orDefault(c.MaxMemory, DefaultMaxMemory)/messageShare)
}

func (c *ZMQClientConfig) maxHold() int { return orDefault(c.MaxMemory, DefaultMaxMemory) / holdShare }

// ErrInvalidConfig is matched by every error of ValidateConfig.
var ErrInvalidConfig = errors.New("kvcache: invalid configuration")

// ValidateConfig reports what keeps a client from starting with config, or nil.
func ValidateConfig(config *ZMQClientConfig) error {
	if config == nil {
		return fmt.Errorf("%w: it is nil", ErrInvalidConfig)
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"ReplayTimeout", config.ReplayTimeout},
		{"ReconnectDelay", config.ReconnectDelay},
		{"StopTimeout", config.StopTimeout},
		{"PingTimeout", config.PingTimeout},
	} {
		if d.value < 0 {
			return fmt.Errorf("%w: %s is negative: %v", ErrInvalidConfig, d.name, d.value)
		}
	}
	for _, n := range []struct {
		name  string
		value int
	}{{"MaxMessage", config.MaxMessage}, {"MaxMemory", config.MaxMemory}, {"Rank", config.Rank}} {
		if n.value < 0 {
			return fmt.Errorf("%w: %s is negative: %d", ErrInvalidConfig, n.name, n.value)
		}
	}
	if memory := orDefault(config.MaxMemory, DefaultMaxMemory); memory < minMemory {
		return fmt.Errorf("%w: MaxMemory is %d bytes, less than %d", ErrInvalidConfig, memory, minMemory)
	} else if most := memory / messageShare; config.MaxMessage > most {
		return fmt.Errorf("%w: MaxMessage is %d bytes, more than a %dnd of MaxMemory (%d): decoded, it could take more than "+
			"that", ErrInvalidConfig, config.MaxMessage, messageShare, most)
	}
	if config.HistoryLost > PolicyKeep {
		return fmt.Errorf("%w: unknown HistoryLost policy %d", ErrInvalidConfig, config.HistoryLost)
	}
	if ns := config.MetricsNamespace; ns != "" && ns != NamespaceKvtap && ns != NamespaceAIBrix {
		return fmt.Errorf("%w: MetricsNamespace is %q, not %q or %q", ErrInvalidConfig, ns, NamespaceKvtap, NamespaceAIBrix)
	}
	if config.Listen && config.PubEndpoint == "" {
		return fmt.Errorf("%w: Listen needs PubEndpoint, such as tcp://*:5557", ErrInvalidConfig)
	}
	pub, err := config.pubEndpoint()
	if err != nil {
		return err
	}
	replay, err := config.replayEndpoint()
	if err != nil {
		return err
	}
	if pub == replay {
		return fmt.Errorf("%w: events and replay are both at %s; a rank's port may have met another rank's replay port",
			ErrInvalidConfig, pub)
	}
	return nil
}

// pubEndpoint returns where events come from.
func (c *ZMQClientConfig) pubEndpoint() (string, error) {
	return c.endpoint("PubEndpoint", c.PubEndpoint, "PubPort", c.PubPort)
}

// replayEndpoint returns where replays are asked for, or "" if nowhere.
func (c *ZMQClientConfig) replayEndpoint() (string, error) {
	// An explicit PubEndpoint says nothing about where a replay would be.
	if c.NoReplay || (c.ReplayEndpoint == "" && c.PubEndpoint != "") {
		return "", nil
	}
	return c.endpoint("ReplayEndpoint", c.ReplayEndpoint, "RouterPort", c.RouterPort)
}

func (c *ZMQClientConfig) endpoint(name, explicit, portName string, port int) (string, error) {
	if explicit != "" {
		_, address, err := zmtp.ParseEndpoint(explicit)
		if err != nil {
			return "", fmt.Errorf("%w: %s: %w", ErrInvalidConfig, name, err)
		}
		if listens := c.Listen && name == "PubEndpoint"; !listens &&
			(strings.HasPrefix(address, ":") || strings.HasSuffix(address, ":0")) {
			return "", fmt.Errorf("%w: %s: a wildcard is for the engine to listen on; name its host and port here: %q",
				ErrInvalidConfig, name, explicit)
		}
		return explicit, nil
	}
	if c.PodIP == "" {
		return "", fmt.Errorf("%w: PodIP is required where %s is not set", ErrInvalidConfig, name)
	}
	ip, err := netip.ParseAddr(c.PodIP)
	if err != nil {
		return "", fmt.Errorf("%w: PodIP is not an IP address: %q (a host name goes into %s)",
			ErrInvalidConfig, c.PodIP, name)
	}
	if port < 1 || port > 65535 {
		return "", fmt.Errorf("%w: %s is not a TCP port: %d", ErrInvalidConfig, portName, port)
	}
	return "tcp://" + net.JoinHostPort(ip.String(), strconv.Itoa(port)), nil
}
