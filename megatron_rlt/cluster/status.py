"""`megatron-rlt status`: what the files of a run folder say of it, read from any machine, also while it runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_rlt.cluster.failed_ranks import failures_of, ranks_of
from megatron_rlt.config.hf_config import is_finite_number
from megatron_rlt.config.loading import read_yaml
from megatron_rlt.given_files import read_json_object, read_text
from megatron_rlt.launch.failures import Failure, Kind, culprit
from megatron_rlt.launch.progress import ATTEMPTS, LATEST
from megatron_rlt.launch.records import RANKS, Records

_METRICS, _CONFIG, _RUN = "metrics.jsonl", "config.yaml", "run.json"
_DAMAGED = "the run folder is damaged: look into its files"
_STEPS_OF_A_RATE = 10
_MAX_SECONDS = 1e8  # of a phase; no step takes three years
_MAX_QUIET_SECONDS = 30.0  # watchdogs give a sign about once a second; a file system may show it later
_NUM_RANKS_NAMED = 5


def status_lines(run_folder: Path, *, now: float) -> list[str]:
    """What is known of a run, one fact a line. Raises ValueError if the folder holds no run and no attempt at one."""
    attempt = _latest_attempt(run_folder)
    if attempt is None and not (run_folder / _RUN).is_file():
        raise ValueError(f"{run_folder}: holds no run (no {_RUN}); give the output_dir of a command that has started")
    lines = [*_run_lines(run_folder), *_checkpoint_lines(run_folder)]
    if attempt is not None:
        lines += [f"attempt: {attempt.name}", *_rank_lines(attempt, now=now), *_failure_lines(attempt)]
    return lines


def _latest_attempt(run_folder: Path) -> Path | None:
    """The attempt that held the run last; before any did, the newest."""
    link = run_folder / ATTEMPTS / LATEST
    if link.is_dir():
        return link.resolve()
    found = [path for path in (run_folder / ATTEMPTS).glob("*-*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _run_lines(run_folder: Path) -> Iterator[str]:
    if not (run_folder / _RUN).is_file():
        return
    if not (run_folder / _CONFIG).is_file():
        raise ValueError(f"{run_folder / _CONFIG}: no such file; {_DAMAGED}")
    record, config = read_json_object(run_folder / _RUN, remedy=_DAMAGED), read_yaml(run_folder / _CONFIG)
    command, starts = record.get("command"), record.get("starts")
    if not isinstance(command, str) or not isinstance(starts, list):
        raise ValueError(f"{run_folder / _RUN}: holds no command and starts; {_DAMAGED}")
    yield f"run: {command} in {run_folder}, started {len(starts)} times"
    steps = _last_steps(run_folder / _METRICS)
    if not steps:
        yield "step: none finished yet"
        return
    last, total = steps[-1]["step"], config.get("num_steps")
    seconds = mean(_seconds(step) for step in steps)
    left = f", {_duration((total - last) * seconds)} left" if isinstance(total, int) and total > last else ""
    yield f"step: {last}{f' of {total}' if isinstance(total, int) else ''}, {seconds:.1f} s each{left}"
    rates = {
        name.partition("/")[2]: value for name, value in steps[-1].items() if name.startswith("tokens_per_second/")
    }
    if rates:
        yield "tokens per second: " + ", ".join(f"{phase} {rate:,.0f}" for phase, rate in rates.items())


def _last_steps(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = [line for line in read_text(file, remedy=_DAMAGED).split("\n") if line.endswith("}")]
    return [_step(line, file) for line in lines[-_STEPS_OF_A_RATE:]]


def _step(line: str, file: Path) -> dict[str, Any]:
    """A line of metrics: a step's number, and numbers by name."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    given = values if isinstance(values, dict) else {}
    step = {name: number for name, number in given.items() if is_finite_number(number)}
    are_numbers = all(isinstance(one, int | float | None) for one in given.values())
    are_seconds = all(0 <= value <= _MAX_SECONDS for name, value in step.items() if name.startswith("seconds/"))
    if not (are_numbers and are_seconds and isinstance(step.get("step"), int)):
        raise ValueError(f"{file}: a line is no record of a step; {_DAMAGED}")
    return step


def _seconds(step: Mapping[str, Any]) -> float:
    return math.fsum(value for name, value in step.items() if name.startswith("seconds/"))


def _checkpoint_lines(run_folder: Path) -> Iterator[str]:
    found = sorted((run_folder / "checkpoints").glob("step-*"))
    if found:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found[-1].stat().st_mtime))
        yield f"checkpoint: {found[-1].name}, written {written}"
    if (run_folder / "hf").is_dir():
        yield f"weights: {run_folder / 'hf'}"


def _rank_lines(attempt: Path, *, now: float) -> Iterator[str]:
    records = Records(attempt / RANKS)
    ranks = ranks_of(attempt)
    if not ranks:
        yield "ranks: none has started yet"
        return
    done = [rank for rank in ranks if records.is_done(rank)]
    failed = records.failures().keys()
    running = [rank for rank in ranks if rank not in done and rank not in failed]
    yield f"ranks: {len(ranks)} started, {len(done)} ended well, {len(failed)} failed, {len(running)} not ended"
    phases: dict[str, list[int]] = {}
    for rank in running:
        phases.setdefault(records.phase(rank), []).append(rank)
    if phases:
        yield "phase: " + ", ".join(f"{phase} ({len(those)} ranks)" for phase, those in phases.items())
    for rank in running:
        seconds = now - (records.last_sign(rank) or (attempt / RANKS / f"host-{rank}").stat().st_mtime)
        if seconds > _MAX_QUIET_SECONDS:
            yield f"silent: rank {rank} on {records.host(rank)}, for {_duration(seconds)}, in {records.phase(rank)}"


def _failure_lines(attempt: Path) -> Iterator[str]:
    """The cause first, with its traceback; then the others, folded where they only lost a connection."""
    failures = failures_of(attempt)
    if not failures:
        return
    first, records = culprit(failures), Records(attempt / RANKS)
    yield f"failed first: {_named(first, records)}: {first.message}"
    yield from first.details.splitlines()
    others = [failure for failure in failures if failure is not first]
    lost = [failure.rank for failure in others if failure.kind in (Kind.CONNECTION, Kind.VANISHED)]
    for failure in [other for other in others if other.rank not in lost][:_NUM_RANKS_NAMED]:
        yield f"then: {_named(failure, records)}: {failure.message.splitlines()[0]}"
    if lost:
        yield f"then: {len(lost)} ranks lost a peer"


def _named(failure: Failure, records: Records) -> str:
    if failure.rank < 0:
        return "no rank"
    return f"rank {failure.rank} on {records.host(failure.rank)} in phase {failure.phase}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
