"""The demo: the paper's experiment in miniature on two CPU ranks, from a random model to three distilled students.

    python -m tools.demo.run runs/demo --seed 0
    python -m tools.demo.run runs/demo --seed 0 --ablation

Each stage is one `megatron-rlt` command on a readable configuration of `configs/demo/`; a stage that is done is not
done again. Everything it reads is an ordinary data set and ordinary Hugging Face folders: nothing in the trainer
knows that this is a demo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from megatron_rlt.config.display import NumberTable
from tools.demo.make_assets import NUM_HEADS, NUM_VLLM_HEADS, make_assets
from tools.demo.picture import draw
from tools.demo.report import print_report
from tools.demo.results import read_results
from tools.demo.stages import NUM_ROWS, Stage, ablation, experiment

SECONDS, RESULTS, PICTURE = "stages.json", "results.json", "demo.png"
"""Files in the demo's folder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of rows, weights, data order and sampling")
    parser.add_argument("--ablation", action="store_true", help="also lambda = 0, and best of n without RL")
    parser.add_argument("--engine", choices=["megatron", "vllm"], default="megatron", help="samples in RL")
    arguments = parser.parse_args()
    folder, seed = arguments.folder, arguments.seed
    stages = experiment(folder, seed, arguments.engine) + (ablation(folder, seed) if arguments.ablation else ())
    num_heads = NUM_VLLM_HEADS if arguments.engine == "vllm" else NUM_HEADS
    return run_demo(folder, stages, seed=seed, num_rows=NUM_ROWS, console=Console(), num_heads=num_heads)


def run_demo(
    folder: Path, stages: Sequence[Stage], *, seed: int, num_rows: int, console: Console, num_heads: int = NUM_HEADS
) -> int:
    """Run what is not done yet, then print the tables, write numbers and picture. Returns the exit status."""
    console.print(plan(stages))
    if not (folder / "assets" / "model").is_dir():
        make_assets(folder / "assets", seed=seed, num_rows=num_rows, num_heads=num_heads)
    numbers = {stage.name: f"{number}/{len(stages)}" for number, stage in enumerate(stages, start=1)}
    for group in side_by_side(stages):
        for stage in group:
            console.rule(f"{numbers[stage.name]}. {stage.title}", align="left")
            if stage.result.exists():
                console.print(f"done before: {stage.result}")
        status = _run(folder, [stage for stage in group if not stage.result.exists()])
        if status != 0:
            return status
    results = read_results(folder)
    (folder / RESULTS).write_text(json.dumps(asdict(results), indent=2) + "\n")
    draw(results, folder / PICTURE)
    print_report(folder, results, console)
    console.print(f"The numbers: {folder / RESULTS}; the picture: {folder / PICTURE}")
    return 0


def plan(stages: Sequence[Stage]) -> NumberTable:
    """What will run, and for how long on two quiet cores."""
    table = NumberTable("Plan", ("stage", "command", "seconds"), text_columns=2)
    for number, stage in enumerate(stages, start=1):
        seconds = "done" if stage.result.exists() else str(stage.expected_seconds)
        table.add_line(f"{number:>2}. {stage.title}", stage.command, seconds)
    table.add_section()
    ahead = [[s.expected_seconds for s in group if not s.result.exists()] for group in side_by_side(stages)]
    table.add_line("in all, on two quiet cores", "", f"{sum(max(seconds, default=0) for seconds in ahead)}")
    return table


def side_by_side(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in their order, those that run at the same time together."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.beside:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _run(folder: Path, group: Sequence[Stage]) -> int:
    """Run stages at the same time. The first one's lines are seen as they come, the others' once it has ended."""
    start = time.monotonic()
    threads = {} if len(group) < 2 else {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        outputs = [stack.enter_context(TemporaryFile()) for _ in group[1:]]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_rlt", *stage.arguments], stdout=output, env=os.environ | threads
            )
            for stage, output in zip(group, [None, *outputs], strict=False)
        ]
        for stage, process in zip(group, running, strict=True):
            if process.wait() == 0:
                _note_seconds(folder, stage, time.monotonic() - start)
        for output in outputs:
            output.seek(0)
            sys.stdout.write(output.read().decode())
    return max((process.returncode for process in running), key=abs, default=0)


def _note_seconds(folder: Path, stage: Stage, seconds: float) -> None:
    """Keep a stage's wall time, so that the report of a second run still knows it."""
    file = folder / SECONDS
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | {stage.name: round(seconds, 1)}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
