"""One whole RL step by phase: `python -m tools.bench.step`.

A random policy and an equal student sample, score and update for real, on one rank. Prints seconds, tokens/s, the
share of the machine's own matrix-product rate (measured in the same run), and memory after each phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.jobs.train.engines import TrainContext, build_context, student_pairs
from megatron_rlt.jobs.train.rollouts import explain
from megatron_rlt.jobs.train.step import step
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer, rates
from megatron_rlt.parallel.platform import stop_distributed
from megatron_rlt.types import Problem, tell_nobody
from tools.bench.machine import describe_machine, matmul_flops_per_second
from tools.bench.workload import save_random_model, start_single_rank
from tools.demo.tokenizer import save_tokenizer

_QUESTIONS = ("5 +5 *5 *6 +4", "2 *3 *2 +5 *6", "6 +1 *4 +2 *3", "1 *5 +3 *2 +6")
PROBLEMS = tuple(Problem(str(number), question, "3") for number, question in enumerate(_QUESTIONS))
_PHASES = ("rollout", "old_policy", "student", "update")
_TAGS = {
    "thought_open": "<exp>",
    "solution_open": "<sol>",
    "explanation_open": "<exp>",
    "explanation_close": "</exp>",
    "separator": " ",
    "padding": " ",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 152_064])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="longest completion; a random model seldom stops early")
    parser.add_argument("--steps", type=int, default=3, help="steps after one that warms up; medians are shown")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_step.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start_single_rank()
    settings = []
    for vocab_size in arguments.vocab:
        with tempfile.TemporaryDirectory() as folder:
            settings.append({"vocab_size": vocab_size} | _bench(arguments, Path(folder), vocab_size))
    stop_distributed()
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.step", "arguments": given, "machine": describe_machine()}
    arguments.out.write_text(json.dumps(record | {"settings": settings}, indent=1) + "\n", encoding="utf-8")


def _bench(arguments: argparse.Namespace, folder: Path, vocab_size: int) -> dict[str, Any]:
    context = prepare_context(arguments, folder, vocab_size)
    memory = MemoryLedger()
    timer = PhaseTimer(heartbeat=lambda _: None, memory=memory)
    taken: list[dict[str, float]] = []
    for number in range(1 + arguments.steps):
        result = step(context, explain(context, PROBLEMS, number, timer), number, timer)
        taken.append(timer.take() | memory.take())
    dtype = getattr(torch, arguments.dtype)
    matmul_rate = matmul_flops_per_second(dtype)
    taken = [one | rates(one, num_devices=1, peak_flops_per_second=matmul_rate) for one in taken]
    title = f"{arguments.dtype}, hidden {arguments.hidden}, {arguments.layers} layers, vocab {vocab_size}, "
    title += f"{len(result.completions)} completions of {len(result.completions[0].completion.token_ids)} tokens"
    phases = {phase: _medians(phase, taken[1:]) for phase in _PHASES}
    _print(title, phases, matmul_rate)
    return {"matmul_gflops": round(matmul_rate / 1e9, 1), "phases": phases}


def prepare_context(arguments: argparse.Namespace, folder: Path, vocab_size: int) -> TrainContext:
    """A random model of `arguments.hidden` and `arguments.layers` as teacher and as student, ready for `step`."""
    return context_of(TrainConfig.model_validate(settings_of_model(arguments, folder, vocab_size)))


def context_of(config: TrainConfig) -> TrainContext:
    """Models, engines and settings of `step`, loaded."""
    return build_context(config, student_pairs(config), tell_nobody)


def settings_of_model(arguments: argparse.Namespace, folder: Path, vocab_size: int) -> dict[str, Any]:
    """The tree of a `train` whose teacher and student are a random model in `folder`."""
    dtype = getattr(torch, arguments.dtype)
    model = save_random_model(
        folder / "model", hidden_size=arguments.hidden, num_layers=arguments.layers, vocab_size=vocab_size, dtype=dtype
    )
    save_tokenizer(model)
    return _settings(arguments, model, folder)


def _settings(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    side = {"model": model, "dtype": arguments.dtype}
    return {
        "output_dir": folder / "run",
        "teacher": side,
        "student": side,
        "data": {"path": folder},
        "num_steps": 1000,  # what the learning rate is planned for
        "prompts": {"custom_tags": _TAGS, "teacher_system": "", "student_system": "", "exact_text": False},
        "rollout": {"max_completion_tokens": arguments.tokens},
        "scoring": {"max_tokens_per_pack": 4096},
        "grpo": {
            "questions_per_step": len(_QUESTIONS),
            "group_size": arguments.group_size,
            "micro_batch_size": 4,
            "reference": None,
        },
    }


def _medians(phase: str, taken: list[dict[str, float]]) -> dict[str, float]:
    names = ("seconds", "tokens_per_second", "peak_share", "host_bytes")
    return {name: round(statistics.median(one[f"{name}/{phase}"] for one in taken), 4) for name in names}


def _print(title: str, phases: dict[str, dict[str, float]], matmul_rate: float) -> None:
    table = NumberTable(title, ("phase", "seconds", "tokens/s", "share of matmul rate", "host memory after"))
    for phase, facts in phases.items():
        table.add_line(
            phase,
            f"{facts['seconds']:.2f}",
            f"{facts['tokens_per_second']:,.0f}",
            f"{facts['peak_share']:.0%}",
            f"{facts['host_bytes'] / 2**20:,.0f} MiB",
        )
    Console().print(table)
    ratio = phases["student"]["seconds"] / phases["update"]["seconds"]
    Console().print(f"scoring pass / update: {ratio:.2f}; matmul rate {matmul_rate / 1e9:,.0f} GFLOP/s\n")


if __name__ == "__main__":
    main()
