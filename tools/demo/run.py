"""The demo: warm a tiny teacher up, train it with RLT on two CPU ranks, and say what changed.

    python -m tools.demo.run runs/demo

Each stage is one `megatron-rlt` command on a readable configuration of `configs/demo/`; a stage that is done is not
done again. Everything it reads is an ordinary data set and ordinary Hugging Face folders: nothing in the trainer
knows that this is a demo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tools.demo.make_assets import make_assets
from tools.demo.report import print_report

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
NUM_ROWS = 4000


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    title: str
    command: str
    config: str
    result: str  # exists, below the demo's folder, once the stage is done
    overrides: tuple[str, ...]


def stages(folder: Path) -> tuple[Stage, ...]:
    """The demo's commands in their order, each reading what an earlier one wrote."""
    data = f"data.path={folder / 'shards'}"
    scorer, warm_teacher = folder / "scorer" / "hf", folder / "warmup" / "hf"
    return (
        Stage(
            "Rows to shards",
            "prepare",
            "prepare.yaml",
            "shards",
            (f"input=[{folder / 'assets' / 'train.jsonl'}]", f"output_dir={folder / 'shards'}"),
        ),
        Stage(
            "The frozen student: SFT on the noisy traces (DP2)",
            "sft",
            "scorer_2cpu_dp2.yaml",
            "scorer/hf",
            (data, f"model.model={folder / 'assets' / 'model'}", f"output_dir={folder / 'scorer'}"),
        ),
        Stage(
            "The teacher's warm-up: SFT in the teacher's format (DP2)",
            "sft",
            "warmup_2cpu_dp2.yaml",
            "warmup/hf",
            (data, f"model.model={scorer}", f"output_dir={folder / 'warmup'}"),
        ),
        Stage(
            "RLT: teacher TP2 + sequence parallelism, student DP2",
            "train",
            "rlt_2cpu_tp2sp_dp2.yaml",
            "rlt/hf",
            (data, f"teacher.model={warm_teacher}", f"student.model={scorer}", f"output_dir={folder / 'rlt'}"),
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), help="where everything is written")
    folder = parser.parse_args().folder
    console = Console()
    if not (folder / "assets" / "model").is_dir():
        make_assets(folder / "assets", seed=0, num_rows=NUM_ROWS)
    for number, stage in enumerate(stages(folder), start=1):
        console.rule(f"{number}. {stage.title}", align="left")
        if (folder / stage.result).exists():
            console.print(f"done before: {folder / stage.result}")
            continue
        status, seconds = _run(stage)
        if status != 0:
            return status
        _note_seconds(folder, stage, seconds)
    print_report(folder, console)
    return 0


def _run(stage: Stage) -> tuple[int, float]:
    command = [sys.executable, "-m", "megatron_rlt", stage.command, str(CONFIGS / stage.config), *stage.overrides]
    start = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    return status, time.monotonic() - start


def _note_seconds(folder: Path, stage: Stage, seconds: float) -> None:
    """Keep a stage's wall time, so that the report of a second run still knows it."""
    file = folder / "stages.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | {stage.title: round(seconds, 1)}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
