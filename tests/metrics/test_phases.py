"""Phase times, tokens per second, heartbeats and the memory ledger."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer


def test_seconds_and_tokens_add_up_by_phase_and_start_afresh() -> None:
    beats: list[str] = []
    timer = PhaseTimer(heartbeat=beats.append, memory=MemoryLedger())
    for tokens in (30, 10):
        with timer.phase("rollout") as phase:
            phase.tokens = tokens
            time.sleep(0.05)
    with timer.phase("reward"):
        pass
    values = timer.take()
    assert beats == ["rollout", "rollout", "reward"]
    assert 0.1 <= values["seconds/rollout"] < 1.0
    assert values["tokens/rollout"] == 40
    assert values["tokens_per_second/rollout"] == pytest.approx(40 / values["seconds/rollout"])
    assert "tokens_per_second/reward" not in values
    assert timer.take() == {}


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
