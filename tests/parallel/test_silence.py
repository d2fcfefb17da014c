"""Ranks that are stopped and cannot report themselves: the launcher names them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlt.launch.records import Records
from megatron_rlt.launch.silence import Silence
from tests.parallel.forked_jobs import start_forked

_TIMEOUT_SECONDS = 3.0


@pytest.mark.parametrize(
    ("job", "blamed", "before"),
    [
        ("freezes_rank_1", "rank 1", ["rank 0 made no progress either, in phase scoring"]),
        ("freezes_all", "rank 0", []),  # a second before rank 1
    ],
)
def test_a_rank_without_a_sign_of_life_is_named_rather_than_one_that_waits_for_it(
    job: str, blamed: str, before: list[str], tmp_path: Path
) -> None:
    process = start_forked(job, tmp_path, timeout_seconds=_TIMEOUT_SECONDS)
    process.join(60)
    assert process.exitcode == 1
    *others, line = (tmp_path / "errors").read_text().splitlines()
    assert others == before, line
    assert re.match(
        rf"megatron-rlt: error: {blamed} failed in phase rollout: no sign of life for [\d.]+ s: the process is stopped",
        line,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_silence_counts_from_the_last_sign_and_not_while_the_whole_machine_sleeps(
    clock: Callable[[float], None], tmp_path: Path
) -> None:
    records = Records(tmp_path)
    silence = Silence(records, 2, timeout_seconds=20.0)
    for _ in range(30):
        clock(1.0)
        silence.listen([0, 1])
    assert silence.quiet_ranks() == [], "neither has begun"
    for rank in (0, 1):
        records.mark_alive(rank)
    silence.listen([0, 1])
    for second in range(11):
        os.utime(tmp_path / "alive-0", (second, second))
        clock(1.0)
        silence.listen([0, 1])
    assert silence.quiet_ranks() == [1], "more than half its timeout"
    assert not silence.is_too_long([0, 1])
    clock(3600.0)
    silence.listen([0, 1])
    assert silence.seconds(1) == 12.0
    for _ in range(24):  # 36 s, and the limit is 1.25 x 20 + 10 = 35
        clock(1.0)
        silence.listen([0, 1])
    assert silence.is_too_long([0, 1])
    assert not silence.is_too_long([]), "a rank that has died is not silent"
    records.mark_done(0)
    records.mark_done(1)
    assert not silence.is_too_long([0, 1])
