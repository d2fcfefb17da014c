"""`collect` killed by SIGKILL at random moments ends with the rows of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.loading import to_yaml
from megatron_rlt.jobs.collect.run import run_collect
from megatron_rlt.launch.launch import run_job
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.writer import read_metrics
from tests.jobs.tiny_collect import CollectInputs, collect_inputs, rows_of
from tests.jobs.tiny_scores import write_rows
from tests.ranks import forkserver
from tools.preloaded import PreloadedCommand

NUM_KILLS = 5
# A run of 7 parts begins 28 phases while it samples, 42 while it scores, and a few around them. Each start of these
# kills begins 3 to 15, so that they spread over both, and no start ends before its kill.
PHASES = (3, 16)
BEST = {"selection": {"rule": "best_of_n"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> CollectInputs:
    return collect_inputs(tmp_path_factory.mktemp("collect"))


@pytest.fixture(scope="module")
def undisturbed(inputs: CollectInputs, tmp_path_factory: pytest.TempPathFactory) -> CollectConfig:
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = [
        {"id": f"q{n}", "question": f"What is {n} and four?", "solution": f"the answer is {n + 4}"} for n in range(13)
    ]
    config = inputs.config(folder, data=write_rows(folder / "rows.jsonl", rows), **BEST)
    assert _start(config, kill_at=None) == 0
    return config


def _start(config: CollectConfig, kill_at: tuple[str | int, float] | None) -> int:
    """One start in a process of its own; returns how it ended."""
    process = forkserver().Process(target=_collect, args=(config, kill_at))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode


def _collect(config: CollectConfig, kill_at: tuple[str | int, float] | None) -> None:
    """What a rank of the command runs; so long after a phase, given by name or number, the process kills itself."""
    seen: list[str] = []

    def on_phase(name: str) -> None:
        seen.append(name)
        if kill_at is not None and kill_at[0] in (name, len(seen)):
            threading.Timer(kill_at[1], os.kill, (os.getpid(), signal.SIGKILL)).start()

    def job(config: CollectConfig, heartbeat: Heartbeat) -> int:
        return run_collect(config, Heartbeat(rank=0, folder=config.output_dir, timeout_seconds=600, on_phase=on_phase))

    os._exit(run_job(job, config, 1))


def _outcome(config: CollectConfig) -> Any:
    folder = config.output_dir / "scored"
    table = pq.read_table(folder / "explanations.parquet")
    return table, (folder / "sft_best_of_n.jsonl").read_bytes(), sorted(path.name for path in folder.iterdir())


def test_five_kills_at_random_moments_lose_at_most_a_part_each_and_duplicate_nothing(
    inputs: CollectInputs, undisturbed: CollectConfig, tmp_path: Path
) -> None:
    config, rng = inputs.config(tmp_path, data=undisturbed.data, **BEST), random.Random(5)
    parts: dict[Path, int] = {}
    for _ in range(NUM_KILLS):
        assert _start(config, (rng.randrange(*PHASES), 0.005 * rng.random())) == -signal.SIGKILL
        found = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("part-*.parquet")}
        assert found | parts == found, "a part that was complete was lost or done again"
        parts = found
    assert _start(config, ("select", 0.0)) == -signal.SIGKILL
    assert _start(config, None) == 0

    assert {path.parent.name for path in parts} == {"samples", "parts"}, "all kills came while it sampled"
    assert _outcome(config) == _outcome(undisturbed)
    for folder in ("samples", "scored"):
        steps = [record["step"] for record in read_metrics(config.output_dir / folder)]
        assert steps == sorted(set(steps)), "a part's numbers may be lost with a kill, but they never stand twice"


def test_the_command_goes_on_after_a_kill(inputs: CollectInputs, tmp_path: Path) -> None:
    config = inputs.config(tmp_path, **BEST)
    first, _ = _command(config, tmp_path)
    deadline = time.monotonic() + 120
    while not (config.output_dir / "samples" / "part-000001.parquet").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(timeout=60)
    kept = (config.output_dir / "samples" / "part-000001.parquet").stat().st_mtime_ns

    second, printed = _command(config, tmp_path)

    status, output = second.wait(timeout=120), printed.read_text()
    assert status == 0, output
    assert f" parts in {config.output_dir / 'samples'}" in output
    assert "Training rows: " in output
    assert (config.output_dir / "samples" / "part-000001.parquet").stat().st_mtime_ns == kept
    rows = rows_of(config)
    assert len({(row["id"], row["explanation_index"]) for row in rows}) == len(rows) == 21


def _command(config: CollectConfig, folder: Path) -> tuple[PreloadedCommand, Path]:
    """As a user starts it, and the file that gets what it prints."""
    file, printed = folder / "collect.yaml", folder / "printed.txt"
    file.write_text(to_yaml(config))
    return PreloadedCommand(["collect", str(file)], output=printed, errors=printed), printed
