"""Phase times, tokens per second, heartbeats and the memory ledger."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_rlt.metrics.memory import MemoryLedger, MemoryUsage
from megatron_rlt.metrics.phases import PhaseTimer, peak_flops_per_second, rates


def test_seconds_and_tokens_add_up_by_phase_and_start_afresh() -> None:
    beats: list[str] = []
    timer = PhaseTimer(heartbeat=beats.append, memory=MemoryLedger())
    for tokens in (30, 10):
        with timer.phase("rollout") as phase:
            phase.count(tokens, 2e6)
            time.sleep(0.05)
    with timer.phase("reward"):
        pass
    values = timer.take()
    assert beats == ["rollout", "rollout", "reward"]
    assert 0.1 <= values["seconds/rollout"] < 1.0
    assert values["tokens/rollout"] == 40
    assert values["model_flops/rollout"] == 4e6
    assert "tokens/reward" not in values
    assert "model_flops/reward" not in values
    assert timer.take() == {}


def test_rates_are_of_all_devices_and_shares_of_each_devices_peak() -> None:
    """2 s, 40 tokens, 6e9 FLOP on 3 devices of 2e9 FLOP/s: 20 tokens/s, 3e9 FLOP/s, half the peak."""
    values = {"seconds/update": 2.0, "seconds/reward": 1.0, "tokens/update": 40.0, "model_flops/update": 6e9}
    expected = {"tokens_per_second/update": 20.0, "model_flops_per_second/update": 3e9}
    assert rates(values, num_devices=3, peak_flops_per_second=None) == expected
    assert rates(values, num_devices=3, peak_flops_per_second=2e9) == expected | {"peak_share/update": 0.5}


def test_a_stated_peak_goes_before_the_table_and_an_unknown_device_has_none() -> None:
    assert peak_flops_per_second(1e12, "NVIDIA H200") == 1e12
    assert peak_flops_per_second(None, "NVIDIA H200") == 989.4e12
    assert peak_flops_per_second(None, "NVIDIA GeForce GT 710") is None
    assert peak_flops_per_second(None, None) is None


def test_a_phase_that_raises_is_not_counted_and_does_not_block_the_next() -> None:
    timer = PhaseTimer(heartbeat=lambda _: None, memory=MemoryLedger())
    with pytest.raises(ValueError, match="broken"), timer.phase("update"):
        raise ValueError("broken")
    with timer.phase("update"):
        pass
    assert list(timer.take()) == ["seconds/update"]


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer(heartbeat=lambda _: None, memory=MemoryLedger())
    with pytest.raises(AssertionError, match="phase inner begins inside phase outer"), timer.phase("outer"):
        timer.phase("inner").__enter__()


def test_the_ledger_sees_memory_that_a_phase_keeps() -> None:
    ledger = MemoryLedger()
    ledger.record("before")
    kept = np.ones(200 * 2**20, dtype=np.uint8)
    ledger.record("after")
    values = ledger.take()
    growth = values["host_bytes/after"] - values["host_bytes/before"]
    assert 190 * 2**20 < growth < 260 * 2**20
    assert values["host_peak_bytes"] >= values["host_bytes/after"] * 0.99
    assert kept[0] == 1
    assert list(ledger.take()) == ["host_peak_bytes"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a phase's own peak")
def test_a_peak_is_the_phases_own_and_kinds_add_up_to_it() -> None:
    """A phase that used 200 MB and gave them back; one after it that used nothing. 50 MB of them were cache."""
    mib = 2**20
    ledger = MemoryLedger()
    held = MemoryUsage(weights=7, onloaded_weights=3, host_weights=5, gradients=11, optimizer=13, caches=50 * mib)
    ledger.watch(lambda: held)
    ledger.start()
    resident = psutil.Process().memory_info().rss
    np.ones(200 * mib, dtype=np.uint8)
    ledger.record("high")
    high = ledger.take()
    ledger.watch(lambda: replace(held, caches=0))
    ledger.start()
    ledger.record("low")
    low = ledger.take()
    assert 195 * mib < high["memory/peak_bytes/high"] - resident < 230 * mib
    assert 145 * mib < high["memory/activations_bytes/high"] < 180 * mib
    assert low["memory/peak_bytes/low"] < resident + 50 * mib
    assert high["memory/weights_bytes/high"] == 10
    kinds = ("weights", "gradients", "optimizer", "caches", "activations", "other", "host_weights")
    for phase, values in (("high", high), ("low", low)):
        total = sum(values[f"memory/{kind}_bytes/{phase}"] for kind in kinds)
        assert total == values[f"memory/peak_bytes/{phase}"]
    assert low["host_peak_bytes"] >= high["memory/peak_bytes/high"], "the process's own peak is not forgotten"
