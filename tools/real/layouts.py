"""Whether layouts change this model's log-probs: `python -m tools.real.layouts OUT`, the first stages of `make real`.

Each stage is a `megatron-rlt parity` in float32: transformers, Megatron in the teacher's and in the student's layout,
and the engine that sampled the tokens. The model has 9 heads and 3 key-value heads, so tp is 3 or 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tools.real.inputs import CONFIGS, make_inputs
from tools.real.sizes import SIZES
from tools.staged import Stage, plan, run_stages

LAYOUTS = {
    "dp2_pp2": (2, "{}", "{pp: 2}"),
    "pp2_cp2": (2, "{pp: 2}", "{cp: 2}"),
    "tp3_dp3": (3, "{tp: 3}", "{}"),
}
"""Ranks, the teacher's layout and the student's; what they leave of the ranks is data-parallel."""
MAX_GAP = 2e-4
"""Nats; `parity` fails above it."""
_SECONDS = 45


@dataclass(frozen=True)
class LayoutGap:
    """Log-probs of the same tokens by two backends."""

    model: str  # teacher or student
    layout: str
    between: str
    num_tokens: int
    p99: float  # of the differences, nats
    maximum: float


def layout_stages(folder: Path) -> tuple[Stage, ...]:
    """One comparison per pair of layouts."""
    return tuple(_stage(folder, name, *layout) for name, layout in LAYOUTS.items())


def _stage(folder: Path, name: str, world_size: int, teacher: str, student: str) -> Stage:
    target = folder / f"parity_{name}"
    model = folder / "model"
    return Stage(
        target.name,
        f"Log-probs against transformers: teacher {_words(world_size, teacher)}, student {_words(world_size, student)}",
        "parity",
        CONFIGS / "parity_2cpu_dp2_pp2.yaml",
        target / "parity.json",
        (
            f"output_dir={target}",
            f"world_size={world_size}",
            f"teacher.model={model}",
            f"teacher.layout={teacher}",
            f"student.model={model}",
            f"student.layout={student}",
            f"data.path={folder / 'data' / 'train.jsonl'}",
            f"parity.max_gap={MAX_GAP}",
        ),
        _SECONDS,
    )


def _words(world_size: int, layout: str) -> str:
    """`pp 2` of `{pp: 2}`; what is left is data-parallel."""
    return layout.strip("{}").replace(":", "") or f"dp {world_size}"


def read_layout_gaps(folder: Path) -> list[LayoutGap]:
    """What the comparisons found; none that has not run."""
    gaps = []
    for name, (world_size, teacher, student) in LAYOUTS.items():
        file = folder / f"parity_{name}" / "parity.json"
        layouts = {"teacher": _words(world_size, teacher), "student": _words(world_size, student)}
        for gap in json.loads(file.read_text()) if file.is_file() else []:
            between = " - ".join(gap["sides"])
            gaps.append(
                LayoutGap(gap["model"], layouts[gap["model"]], between, gap["num_tokens"], gap["p99"], gap["maximum"])
            )
    return gaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of `make real`; the model is fetched if it is not there")
    folder = parser.parse_args().out
    stages, console = layout_stages(folder), Console()
    console.print(plan(stages))
    make_inputs(folder, SIZES["small"], seed=0)
    return run_stages(folder, stages, console)


if __name__ == "__main__":
    sys.exit(main())
