# Copyright 2026 The kvtap Authors
# SPDX-License-Identifier: Apache-2.0
"""A scheduler for vLLM that writes down what its block pool holds, batch by batch.

Served with --scheduler-cls truth_scheduler.TruthScheduler, this module on PYTHONPATH, and KVTAP_E2E_TRUTH naming the
file to write; data-parallel rank r > 0 appends ".r". Each line is one batch of events, as JSON: its number and the
copies that the pool holds once everything in the batch has happened, by the last 8 bytes of the block's digest in hex
and the group.

    {"seq": 17, "held": {"00f3a6b1c4d2e5f6:0": 1}}

A line is on its way to the file before its batch is to the sockets, so whoever has a batch finds its line.
"""

import json
import os

from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class TruthScheduler(AsyncScheduler):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        rank = self.vllm_config.parallel_config.data_parallel_index
        path = os.environ["KVTAP_E2E_TRUTH"] + (f".{rank}" if rank else "")
        out = open(path, "a", encoding="ascii")
        publish = self.kv_event_publisher.publish
        number = 0

        # The scheduler drains its events and publishes them in one go, on the thread that changes the pool: here the
        # pool is what the batch makes of it. The publisher numbers batches in this order, from 0.
        def note_and_publish(batch):
            nonlocal number
            out.write(json.dumps({"seq": number, "held": self._held()}) + "\n")
            out.flush()
            number += 1
            publish(batch)

        self.kv_event_publisher.publish = note_and_publish

    def _held(self):
        held = {}
        # A key has one block, or several copies by their id.
        for key, blocks in self.kv_cache_manager.block_pool.cached_block_hash_to_block._cache.items():
            place = f"{get_block_hash(key)[-8:].hex()}:{get_group_id(key)}"
            held[place] = held.get(place, 0) + (len(blocks) if isinstance(blocks, dict) else 1)
        return held
