# Copyright 2026 The kvtap Authors
# SPDX-License-Identifier: Apache-2.0
"""A libzmq peer for tests, driven over stdin and stdout, one line each way at a time.

    peer.py pub|xpub|sub|router|dealer [--bind EP | --connect EP] [--subscribe HEX]... [--opt NAME=VALUE]... [--monitor]
    peer.py publish [--stream FILE] [--before N|all] [--pub EP] [--connect-out] [--replay EP] [--framing old|new]
                    [--topic TEXT] [--buffer N] [--xpub] [--opt NAME=VALUE]... [--replay-opt NAME=VALUE]...

Its first line is `ready NAME=ENDPOINT...` with the real ports. Empty frames are written as `-`, others in hex.

Plain sockets: `send FRAME...` sends a message; `burst N SIZE` sends N messages [topic, 8-byte number, SIZE bytes];
`subscribe HEX` and `unsubscribe HEX` change a SUB. What arrives is printed as `message FRAME...` (for an xpub, a
subscription is a message of one frame that begins with 01 or 00); a router answers every message with itself. With
--monitor, socket events are printed as `event NAME`.

publish is an engine's publisher: batches `SEQ HEX` of a gzipped file go out as [topic, seq, payload] and stay in a
buffer of N steps, from which replay requests are answered, between two batches or while idle, by the same thread.
--before publishes batches before there are sockets to reach it by. `publish N|all` publishes the next batches and
prints `published COUNT LAST`; `lose N` only buffers them, as if the high-water mark had dropped them, and prints
`lost COUNT LAST`; `send SEQ HEX` publishes one that is in no file. Each replay prints `replayed START COUNT`.

`exit`, or the end of stdin, ends it at once.
"""
import argparse
import collections
import gzip
import os
import sys

import zmq
from zmq.utils.monitor import parse_monitor_message

END = b"\xff" * 8


def say(*words):
    sys.stdout.write(" ".join(str(w) for w in words) + "\n")
    sys.stdout.flush()


def to_text(frames):
    return [f.hex() or "-" for f in frames]


def to_frames(words):
    return [b"" if w == "-" else bytes.fromhex(w) for w in words]


class Lines:
    """Commands from stdin, read without a buffer that a poller would not see."""

    def __init__(self):
        self.rest = b""

    def read(self):
        data = os.read(0, 65536)
        if not data:
            sys.exit(0)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line.decode().split() for line in lines if line.strip()]


def limit_of(word):
    return None if word == "all" else int(word)


def set_options(socket, options):
    socket.linger = 0
    for option in options or []:
        name, _, value = option.partition("=")
        constant = getattr(zmq, name)
        if value.lstrip("-").isdigit():
            socket.setsockopt(constant, int(value))
        else:
            socket.setsockopt(constant, value.encode())


def bind(socket, endpoint):
    if endpoint.startswith("tcp://["):
        socket.ipv6 = True
    socket.bind(endpoint)
    return socket.last_endpoint.rstrip(b"\x00").decode()


def connect(socket, endpoint):
    if endpoint.startswith("tcp://["):
        socket.ipv6 = True
    socket.connect(endpoint)
    return endpoint


def plain(args):
    context = zmq.Context()
    socket = context.socket(getattr(zmq, args.role.upper()))
    set_options(socket, args.opt)
    for prefix in args.subscribe or []:
        socket.subscribe(b"" if prefix == "-" else bytes.fromhex(prefix))
    monitor = socket.get_monitor_socket() if args.monitor else None
    if args.connect:
        endpoint = connect(socket, args.connect)
    else:
        endpoint = bind(socket, args.bind)
    say("ready", "endpoint=" + endpoint)

    poller = zmq.Poller()
    poller.register(0, zmq.POLLIN)
    if args.role != "pub":
        poller.register(socket, zmq.POLLIN)
    if monitor:
        poller.register(monitor, zmq.POLLIN)
    lines = Lines()
    while True:
        ready = dict(poller.poll())
        if socket in ready:
            frames = socket.recv_multipart()
            if args.role == "router":
                socket.send_multipart(frames)
                frames = frames[1:]
            say("message", *to_text(frames))
        if monitor in ready:
            event = parse_monitor_message(monitor.recv_multipart())
            say("event", zmq.Event(event["event"]).name)
        if 0 not in ready:
            continue
        for name, *words in lines.read():
            if name == "exit":
                return
            if name == "send":
                socket.send_multipart(to_frames(words))
            elif name == "burst":
                payload = b"p" * int(words[1])
                for n in range(int(words[0])):
                    socket.send_multipart([b"kv@pod@model", n.to_bytes(8, "big"), payload])
            elif name == "subscribe":
                socket.subscribe(b"" if words[0] == "-" else bytes.fromhex(words[0]))
            elif name == "unsubscribe":
                socket.unsubscribe(b"" if words[0] == "-" else bytes.fromhex(words[0]))
            else:
                sys.exit("unknown command " + name)


def publish(args):
    stream = iter(())
    if args.stream:
        stream = (line.split() for line in gzip.open(args.stream, "rt"))
    context = zmq.Context()
    pub = context.socket(zmq.XPUB if args.xpub else zmq.PUB)
    pub.sndhwm = 100000
    router = context.socket(zmq.ROUTER)
    set_options(pub, args.opt)
    set_options(router, args.replay_opt)

    topic = args.topic.encode()
    prefix = [b""] if args.framing == "old" else [b"", topic]
    held = collections.deque(maxlen=args.buffer)
    replays = zmq.Poller()
    replays.register(router, zmq.POLLIN)

    def replay():
        frames = router.recv_multipart()
        if len(frames) != 3:  # what real engines do with it: nothing
            return
        peer, _, start = frames
        start = int.from_bytes(start, "big")
        count = 0
        for seq, payload in held:
            if seq >= start:
                router.send_multipart([peer, *prefix, seq.to_bytes(8, "big"), payload])
                count += 1
        end = [b""] if args.framing == "old" else [b"", b""]
        router.send_multipart([peer, *end, END, b""])
        say("replayed", start, count)

    def take(limit, send):
        count, last = 0, -1
        while limit is None or count < limit:
            batch = next(stream, None)
            if batch is None:
                break
            last, payload = int(batch[0]), bytes.fromhex(batch[1])
            put(last, payload, send)
            count += 1
        return count, last

    def put(seq, payload, send):
        if replays.poll(0):
            replay()
        if send:
            pub.send_multipart([topic, seq.to_bytes(8, "big"), payload])
        held.append((seq, payload))

    take(limit_of(args.before), True)
    endpoint = connect(pub, args.pub) if args.connect_out else bind(pub, args.pub)
    say("ready", "pub=" + endpoint, "replay=" + bind(router, args.replay))

    poller = zmq.Poller()
    poller.register(0, zmq.POLLIN)
    poller.register(router, zmq.POLLIN)
    if args.xpub:
        poller.register(pub, zmq.POLLIN)
    lines = Lines()
    while True:
        ready = dict(poller.poll())
        if router in ready:
            replay()
        if pub in ready:
            say("message", *to_text(pub.recv_multipart()))
        if 0 not in ready:
            continue
        for name, *words in lines.read():
            if name == "exit":
                return
            if name == "publish":
                say("published", *take(limit_of(words[0]), True))
            elif name == "lose":
                say("lost", *take(limit_of(words[0]), False))
            elif name == "send":
                put(int(words[0]), b"" if words[1] == "-" else bytes.fromhex(words[1]), True)
                say("published", 1, words[0])
            else:
                sys.exit("unknown command " + name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["pub", "xpub", "sub", "router", "dealer", "publish"])
    parser.add_argument("--bind", default="tcp://127.0.0.1:*")
    parser.add_argument("--connect")
    parser.add_argument("--subscribe", action="append")
    parser.add_argument("--opt", action="append")
    parser.add_argument("--monitor", action="store_true")
    parser.add_argument("--stream")
    parser.add_argument("--before", default="0")
    parser.add_argument("--pub", default="tcp://127.0.0.1:*")
    parser.add_argument("--connect-out", action="store_true")
    parser.add_argument("--replay", default="tcp://127.0.0.1:*")
    parser.add_argument("--replay-opt", action="append")
    parser.add_argument("--framing", choices=["old", "new"], default="new")
    parser.add_argument("--topic", default="")
    parser.add_argument("--buffer", type=int, default=10000)
    parser.add_argument("--xpub", action="store_true")
    parser.add_argument("--hwm", type=int)
    args = parser.parse_args()
    if args.hwm is not None:
        args.opt = (args.opt or []) + ["SNDHWM=%d" % args.hwm]
    if args.role == "publish":
        publish(args)
    else:
        plain(args)


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is flushed: a peer that exits drops what it had queued
