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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tools.demo.make_assets import NUM_HEADS, NUM_VLLM_HEADS, make_assets
from tools.demo.picture import draw
from tools.demo.report import print_report
from tools.demo.results import read_results
from tools.demo.stages import NUM_ROWS, ablation, experiment
from tools.staged import Stage, plan, run_stages

RESULTS, PICTURE = "results.json", "demo.png"
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
    status = run_stages(folder, stages, console)
    if status != 0:
        return status
    results = read_results(folder)
    (folder / RESULTS).write_text(json.dumps(asdict(results), indent=2) + "\n")
    draw(results, folder / PICTURE)
    print_report(folder, results, console)
    console.print(f"The numbers: {folder / RESULTS}; the picture: {folder / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
