"""A whole RLT step against TRL's GRPOTrainer on the CPU: `python -m tools.bench.against_trl`.

Both sides start from one random Llama and see the same prompts, group size and completion lengths. TRL's reward is the
reference's way (`reference_reward.py`). Sides take turns, step by step; each has all cores. TRL is installed into
`build/bench-trl` the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.types import Problem
from tools.bench.reference_reward import RewardTexts
from tools.bench.sides import SideTurns, start_alone, start_ranks
from tools.bench.trl_environment import ROOT, packages, trl_python
from tools.bench.turns import Task
from tools.bench.workload import save_random_model
from tools.demo.tokenizer import SPECIAL_TOKENS, save_tokenizer, vocabulary

TAGS = {
    "thought_open": "<exp>",
    "solution_open": "<sol>",
    "explanation_open": "<exp>",
    "explanation_close": "</exp>",
    "separator": " ",
    "padding": " ",
}
_TRL, _ONE, _TWO = "TRL", "megatron_rlt, 1 rank", "megatron_rlt, 2 ranks"
_BUSY_LOAD = 0.5  # processes that wanted a core before the bench began
_PHASES = ("rollout", "reward", "reference", "update")


def main() -> None:
    arguments = _arguments()
    python = trl_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = _task(arguments, folder)
        task.save(folder / "task.json")
        load = os.getloadavg()[0]
        turns = _take_turns(python, folder, rounds=arguments.rounds, cores=arguments.cores)
    num_completions = arguments.questions * arguments.group_size
    _print(arguments, turns, num_completions)
    if load > _BUSY_LOAD:
        print(
            f"The load average was {load:.1f} before the start: these figures are preliminary; run again when it is low"
        )
    record = _record(arguments, turns, num_completions, load)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--questions", type=int, default=4, help="questions of one step")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a question")
    parser.add_argument("--question-tokens", type=int, default=48)
    parser.add_argument("--solution-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions of a forward-backward pass")
    parser.add_argument("--beta", type=float, default=0.04, help="KL to the reference; 0: no reference pass")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side after one that warms up")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "bench_against_trl.json")
    return parser.parse_args()


def _task(arguments: argparse.Namespace, folder: Path) -> Task:
    """Model, tokenizer and one step's questions of random words; every id is a word, so text is never lossy."""
    model = save_random_model(
        folder / "model",
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        vocab_size=arguments.vocab,
        dtype=torch.float32,
    )
    words = [f"w{number}" for number in range(arguments.vocab - len(vocabulary()) - len(SPECIAL_TOKENS))]
    save_tokenizer(model, words)
    config = TrainConfig.model_validate(_settings(arguments, model, folder))
    pairs = pair_builder(model, model, config.prompts)
    problems = _problems(arguments, words)
    return Task(
        model=str(model),
        settings=config.model_dump(mode="json"),
        questions=[{"question": problem.question, "solution": problem.solution} for problem in problems],
        texts=[asdict(reward_texts(pairs, problem)) for problem in problems],
        prompt_ids=[pairs.teacher.prompt(problem).token_ids.tolist() for problem in problems],
        num_steps=1 + arguments.rounds,
    )


def _settings(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    side = {"model": model, "dtype": "float32"}
    return {
        "output_dir": folder / "run",
        "teacher": side,
        "student": side,
        "data": {"path": folder},
        "num_steps": 1 + arguments.rounds,
        "prompts": {"custom_tags": TAGS, "teacher_system": "", "student_system": "", "exact_text": False},
        "rollout": {"max_completion_tokens": arguments.tokens},
        "scoring": {"max_tokens_per_pack": 4096},
        "grpo": {
            "questions_per_step": arguments.questions,
            "group_size": arguments.group_size,
            "micro_batch_size": arguments.micro_batch,
            "reference": {"beta": arguments.beta} if arguments.beta > 0 else None,
        },
    }


def _problems(arguments: argparse.Namespace, words: list[str]) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(words[index] for index in torch.randint(len(words), (count,), generator=generator).tolist())

    return [
        Problem(str(number), text(arguments.question_tokens), text(arguments.solution_tokens))
        for number in range(arguments.questions)
    ]


def reward_texts(pairs: PairBuilder, problem: Problem) -> RewardTexts:
    """A problem in both formats, as text."""
    teacher, student, tags = pairs.teacher, pairs.student, pairs.student.tags
    asked, read = (one.tokenizer.render(one.system, problem.question) for one in (teacher, student))
    return RewardTexts(
        teacher_prompt=asked + tags.teacher_prefill(problem.solution).removesuffix(tags.padding),
        padding=tags.padding,
        end_tag=tags.explanation_close,
        student_prefix=f"{read}{tags.thought_open}",
        bridge=tags.student_bridge,
        solution=tags.student_solution(problem.solution),
        ending=tags.student_end + student.tokenizer.decode([student.tokenizer.end_of_turn_id]),
    )


def _take_turns(python: Path, folder: Path, *, rounds: int, cores: int) -> dict[str, SideTurns]:
    ours = [sys.executable, "-m", "tools.bench.rlt_side", str(folder / "task.json")]
    theirs = [str(python), "-m", "tools.bench.trl_side", str(folder / "task.json")]
    with ExitStack() as stack:
        sides = {_TRL: start_alone(theirs, name="trl", num_threads=cores, folder=folder)}
        stack.callback(sides[_TRL].close)
        for name, num_ranks in ((_ONE, 1), (_TWO, 2)):
            threads = max(cores // num_ranks, 1)
            sides[name] = start_ranks(
                ours, name=f"ranks-{num_ranks}", num_ranks=num_ranks, num_threads=threads, folder=folder
            )
            stack.callback(sides[name].close)
        for number in range(1 + rounds):
            for name, side in sides.items():
                side.take_turn()
                seconds = side.turns(after=number).median_seconds
                print(f"round {number} of {rounds}, {name}: {seconds:.1f} s", file=sys.stderr)
        return {name: side.turns(after=1) for name, side in sides.items()}


def _times_trl(theirs: SideTurns, ours: SideTurns) -> dict[str, Any]:
    """How many times TRL's completions per second: of the median steps, and round by round."""
    return {
        "of_medians": theirs.median_seconds / ours.median_seconds,
        "by_round": [slow / fast for slow, fast in zip(theirs.seconds, ours.seconds, strict=True)],
        "of_median_processor_seconds": statistics.median(theirs.processor_seconds)
        / statistics.median(ours.processor_seconds),
    }


def _print(arguments: argparse.Namespace, turns: dict[str, SideTurns], num_completions: int) -> None:
    title = f"fp32, hidden {arguments.hidden}, {arguments.layers} layers, vocab {arguments.vocab}, {num_completions}"
    title += (
        f" completions of {arguments.tokens} tokens, {arguments.cores} threads a side, medians of {arguments.rounds}"
    )
    headings = ("side", "step", "completions/s", *_PHASES, "processor", "peak memory", "mean reward")
    table = NumberTable(title, headings)
    for name, side in turns.items():
        phases = [f"{side.median_phase(phase):.2f}" for phase in _PHASES]
        rate = num_completions / side.median_seconds
        phases.append(f"{statistics.median(side.processor_seconds):.2f}")
        memory, reward = f"{side.peak_bytes / 2**20:,.0f} MiB", f"{statistics.fmean(side.mean_rewards):.3f}"
        table.add_line(name, f"{side.median_seconds:.2f} s", f"{rate:.2f}", *phases, memory, reward)
    Console().print(table)
    for name in (_ONE, _TWO):
        times = _times_trl(turns[_TRL], turns[name])
        print(
            f"{name}: {times['of_medians']:.2f} times TRL's completions per second"
            f" ({min(times['by_round']):.2f} to {max(times['by_round']):.2f} by round),"
            f" {times['of_median_processor_seconds']:.2f} times per processor second"
        )


def _record(
    arguments: argparse.Namespace, turns: dict[str, SideTurns], num_completions: int, load: float
) -> dict[str, Any]:
    """What the JSON file holds."""
    command = ["python", "-m", "tools.bench.against_trl", *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "python": platform.python_version(),
        "packages": list(packages()),
        "cores": arguments.cores,
        "load_average_at_start": round(load, 1),
        "preliminary": load > _BUSY_LOAD,
        "sizes": {name: value for name, value in vars(arguments).items() if name not in ("out", "cores")},
        "sides": {
            name: {
                "completions_per_second": round(num_completions / side.median_seconds, 3),
                "median_seconds": {"step": side.median_seconds}
                | {phase: side.median_phase(phase) for phase in _PHASES},
                "step_seconds": side.seconds,
                "step_processor_seconds": side.processor_seconds,
                "peak_bytes": side.peak_bytes,
                "mean_reward": statistics.fmean(side.mean_rewards),
            }
            for name, side in turns.items()
        },
        "times_trl": {name: _times_trl(turns[_TRL], turns[name]) for name in (_ONE, _TWO)},
    }


if __name__ == "__main__":
    main()
