"""The demo and its ablation over several seeds: one JSON of all that the README claims about them.

python -m tools.demo.seeds runs/demo-seeds --seeds 0 1 2 --out docs/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tools.accuracy import Accuracy, Answers
from tools.demo.chain_arithmetic import MODULUS, Style
from tools.demo.results import DemoResults, read_results
from tools.demo.run import RESULTS, run_demo
from tools.demo.stages import NUM_ROWS, ablation, experiment
from tools.rl_curves import RlCurves

MARGIN, NEAR_CHANCE = 0.30, 0.05
"""What is asked: the RL teacher's student ahead of both others by so much, lambda = 0 within so much of chance."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="one folder a seed is made here; what is done is not done again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    console = Console()
    folders = {seed: arguments.folder / f"seed-{seed}" for seed in arguments.seeds}
    for with_ablation in (False, True):  # the experiment of every seed first
        for seed, folder in folders.items():
            stages = experiment(folder, seed) + (ablation(folder, seed) if with_ablation else ())
            status = run_demo(folder, stages, seed=seed, num_rows=NUM_ROWS, console=console)
            if status != 0:
                return status
            _write(arguments.out, folders)
    console.print(f"Written: {arguments.out}")
    return 0


def _write(file: Path, folders: dict[int, Path]) -> None:
    """Write what is known so far: the seeds whose experiment is done, with the ablation where that is done."""
    done = {seed: folder for seed, folder in folders.items() if (folder / RESULTS).exists()}
    record = {
        "command": " ".join(["python -m tools.demo.seeds", *map(str, sys.argv[1:])]),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "chance": round(1 / MODULUS, 4),
        "seeds": {str(seed): summary(read_results(folder)) for seed, folder in done.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def summary(results: DemoResults) -> dict[str, Any]:
    """One seed's figures, and whether they are what was asked."""
    greedy = {name: student.answers.greedy.mean for name, student in results.students.items()}
    margin = greedy["rlt"] - max(greedy["original"], greedy["warm"])
    verdicts: dict[str, Any] = {"rlt_ahead_of_both_greedy": round(margin, 4), "rlt_ahead_as_asked": margin >= MARGIN}
    if "lambda0" in greedy:
        from_chance = greedy["lambda0"] - 1 / MODULUS
        verdicts["lambda0_from_chance_greedy"] = round(from_chance, 4)
        verdicts["lambda0_near_chance_as_asked"] = abs(from_chance) <= NEAR_CHANCE
    return verdicts | {
        "students": {
            name: {
                **_answers(student.answers),
                "trace_styles": _rounded(student.trace_styles),
            }
            for name, student in results.students.items()
        },
        "own_rl": {name: _answers(answers) for name, answers in results.own_rl.items()},
        "rl": {name: _ends(run) for name, run in results.rl.items()},
    }


def _ends(run: RlCurves) -> dict[str, list[float]]:
    """First steps against last, see `rl_curves.NUM_FIRST` and `NUM_LAST`."""
    curves = {name: run.ends(name) for name in run.curves}
    styles = {f"{style.value}_share": run.style_ends(style) for style in Style}
    return {name: [round(value, 6) for value in ends] for name, ends in (curves | styles).items()}


def _answers(answers: Answers) -> dict[str, dict[str, float]]:
    return {"greedy": _accuracy(answers.greedy), "sampled": _accuracy(answers.sampled)}


def _accuracy(accuracy: Accuracy) -> dict[str, float]:
    return _rounded(asdict(accuracy))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
