"""Rates of a run that was measured: medians over the steps of its `metrics.jsonl`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.config.loading import read_yaml
from megatron_rlt.given_files import read_text

_READS_SEQUENCES = ("student", "teacher", "old_policy", "reference", "update")
_OF_ALL_STEPS = ("reward", "record", "data", "checkpoint")  # phases whose seconds are taken as they are


@dataclass(frozen=True)
class Calibration:
    """What a plan takes from a run on the same kind of GPU."""

    flops_per_second_of_rank: Mapping[str, float]  # by phase
    fixed_seconds: Mapping[str, float]  # per step, by phase without model FLOP
    seconds_per_decoded_token: float | None  # rollout seconds over the mean length of completions
    prompt_tokens: float | None
    completion_tokens: float | None


def read_calibration(file: Path) -> Calibration:
    """Read a run folder's metrics; the first step, which compiles and allocates, is left out where there are others.

    Raises:
        ValueError: the file holds no step, or a line of it is no JSON.
    """
    steps = _steps(file)
    world_size = read_yaml(file.parent / "config.yaml").get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"calibrate: {file.parent / 'config.yaml'} holds no world_size; give a run's file")
    names = {name for step in steps for name in step if name.startswith("seconds/")}
    phases = {name.partition("/")[2] for name in names}
    rates, fixed = {}, {}
    for phase in sorted(phases):
        flops, seconds = _median(steps, f"model_flops/{phase}"), _median(steps, f"seconds/{phase}")
        if phase.startswith(_READS_SEQUENCES) and flops and seconds:
            rates[phase] = flops / seconds / world_size
        elif phase in _OF_ALL_STEPS:
            fixed[phase] = sum(step.get(f"seconds/{phase}") or 0.0 for step in steps) / len(steps)
    completion, rollout = _median(steps, "completion_tokens"), _median(steps, "seconds/rollout")
    token = rollout / completion if completion and rollout else None
    return Calibration(rates, fixed, token, _median(steps, "prompt_tokens"), completion)


def _steps(file: Path) -> list[dict[str, Any]]:
    steps = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        try:
            steps.append(dict(json.loads(line)))
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"calibrate: {file}, line {number}: no JSON object ({error}); give a run's file"
            ) from error
    if not steps:
        raise ValueError(f"calibrate: {file} holds no step; give the file of a run that has taken some")
    return steps[1:] or steps


def _median(steps: list[dict[str, Any]], name: str) -> float | None:
    values = [float(step[name]) for step in steps if isinstance(step.get(name), int | float)]
    return statistics.median(values) if values else None
