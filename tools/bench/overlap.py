"""RL steps whose completions are sampled ahead, against steps that wait for them: `python -m tools.bench.overlap`.

Needs an environment with vLLM (`make .venv-vllm/.installed`). One trainer rank and one vLLM server with a thread each,
a random policy and an equal student. Prints seconds a step, and which share of them either side had nothing to do, and
writes `docs/results/bench_overlap.json`. Both ways take rounds in turn, each round with a server of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.jobs.rl.mismatch import logprob_metrics
from megatron_rlt.jobs.train.rollouts import RolloutSource
from megatron_rlt.jobs.train.step import step
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.environment import free_port
from megatron_rlt.types import Problem
from tools.bench.machine import describe_machine
from tools.bench.step import PROBLEMS, context_of, settings_of_model
from tools.bench.workload import start_single_rank

_NUM_WARM_UP = 2  # steps: the first is on-policy in both ways, the second still meets cold caches
_VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class Measurement:
    """One way; medians over the steps of all rounds after the warm-up."""

    ahead: int
    step_seconds: float
    trainer_idle_share: float
    engine_idle_share: float
    policy_lag: float  # updates, mean
    rollout_gap_mean: float  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="longest completion; a random model seldom stops early")
    parser.add_argument("--steps", type=int, default=8, help="of each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_overlap.json"))
    arguments = parser.parse_args()
    taken: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(arguments.rounds):
        for ahead, steps in taken.items():
            steps += _round(arguments, ahead)
    rows = [_summary(ahead, steps) for ahead, steps in taken.items()]
    _print(rows)
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.overlap", "arguments": given, "machine": describe_machine()}
    found = {"rows": [asdict(row) for row in rows], "steps": taken}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")


def _round(arguments: argparse.Namespace, ahead: int) -> list[dict[str, float]]:
    """Metrics of its steps after the warm-up."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_take_steps, args=(there, arguments, Path(folder), ahead))
        process.start()
        steps: list[dict[str, float]] = here.recv()
        process.join()
    return steps[_NUM_WARM_UP:]


def _take_steps(there: Connection, arguments: argparse.Namespace, folder: Path, ahead: int) -> None:
    torch.set_num_threads(1)
    start_single_rank(port=free_port())
    config = TrainConfig.model_validate(_settings(arguments, folder, ahead))
    context = context_of(config)
    timer = PhaseTimer(heartbeat=lambda _: None, memory=MemoryLedger())
    rollouts = RolloutSource(context, config.rollout, _same_problems, num_steps=config.num_steps)
    steps, before = [], time.monotonic()
    for number in range(arguments.steps):
        result = step(context, rollouts.next(number, timer), number, timer)
        engine = context.rollout.take_metrics()
        now = time.monotonic()
        steps.append(
            engine
            | logprob_metrics(result.completions, result.gap, policy_version=result.policy_version)
            | {"step_seconds": now - before}
        )
        before = now
    there.send(steps)


def _same_problems(count: int) -> Sequence[Problem]:
    assert count == len(PROBLEMS), "a step asks all of them"
    return PROBLEMS


def _settings(arguments: argparse.Namespace, folder: Path, ahead: int) -> dict[str, Any]:
    """`step`'s, with servers."""
    tree = settings_of_model(arguments, folder, _VOCAB_SIZE)
    vllm = {"placement": "server", "kv_cache_bytes": 2**28}
    return tree | {
        "num_steps": arguments.steps,
        "prompts": tree["prompts"] | {"max_prompt_tokens": 64},
        "rollout": tree["rollout"] | {"engine": "vllm", "ahead": ahead, "vllm": vllm},
        "mismatch": {"token_weight_cap": 2.0},
    }


def _summary(ahead: int, steps: list[dict[str, float]]) -> Measurement:
    def median(name: str) -> float:
        return statistics.median(one[name] for one in steps)

    return Measurement(
        ahead=ahead,
        step_seconds=median("step_seconds"),
        trainer_idle_share=median("idle_share/trainer"),
        engine_idle_share=median("idle_share/engine"),
        policy_lag=median("policy_lag"),
        rollout_gap_mean=median("rollout_gap_mean"),
    )


def _print(rows: Sequence[Measurement]) -> None:
    headings = ("rollout.ahead", "seconds per step", "times", "trainer idle", "server idle", "lag", "mean gap")
    table = NumberTable("one trainer rank and one vLLM server, a thread each, float32", headings)
    for row in rows:
        table.add_line(
            str(row.ahead),
            f"{row.step_seconds:.2f}",
            f"{rows[0].step_seconds / row.step_seconds:.2f}",
            f"{row.trainer_idle_share:.0%}",
            f"{row.engine_idle_share:.0%}",
            f"{row.policy_lag:g}",
            f"{row.rollout_gap_mean:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
