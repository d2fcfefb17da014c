"""`make real`: the paper's experiment on a real language model, SmolLM2-135M-Instruct, with the demo's stages.

    python -m tools.real.run runs/real --size small

Model and word problems are made first; then each stage is one `megatron-rlt` command on a file of `configs/real/`. A
stage that is done is not done again, and one that was stopped goes on. The figures of what is done are written
whenever it ends, and by `--report` without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rlt.whole_files import write_text
from tools.bench.machine import describe_machine
from tools.real.inputs import make_inputs
from tools.real.model import PACKAGE
from tools.real.picture import draw
from tools.real.report import examples_page, print_report
from tools.real.results import read_results
from tools.real.sizes import SIZES
from tools.real.stages import on_one_rank, stages
from tools.staged import Stage, plan, run_stages

RESULTS, PICTURE, EXAMPLES = "real.json", "real.png", "examples.md"
"""Files in its folder."""
_CHOSEN = "begun_with.json"
_FOLDER = Path("runs/real")
_ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=_FOLDER, help="where everything is written")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="full: 150 minutes on two quiet cores")
    parser.add_argument("--seed", type=int, default=0, help="of rows, data order and sampling")
    parser.add_argument(
        "--ranks", type=int, choices=[1, 2], default=2, help="1 on one GPU; layouts are not compared then"
    )
    parser.add_argument("--report", action="store_true", help="run nothing; write the figures of what is done")
    arguments = parser.parse_args()
    folder, size, seed = arguments.folder, SIZES[arguments.size], arguments.seed
    console, chain = Console(), stages(folder, size, seed)
    if arguments.ranks == 1:
        chain = on_one_rank(chain)
    if not arguments.report:
        # glibc keeps freed blocks of many sizes: with large ones mapped, a rank of RL does not grow from step to step.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 * 2**20))
        _begin(folder, {"size": arguments.size, "seed": seed, "ranks": arguments.ranks})
        console.print(plan(chain))
        make_inputs(folder, size, seed=seed)
    status = 0 if arguments.report else run_stages(folder, chain, console)
    write_results(folder, record_of(arguments.size, seed, arguments.ranks), console)
    return status


def _begin(folder: Path, chosen: dict[str, Any]) -> None:
    """Keep what a folder was begun with; its stages must not be mixed with those of another size."""
    file = folder / _CHOSEN
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(chosen) + "\n")
    elif (before := json.loads(file.read_text())) != chosen:
        sys.exit(f"{folder} was begun with {before}, not {chosen}: choose another folder (make real REAL_DIR=...)")


def write_results(folder: Path, record: dict[str, Any], console: Console) -> None:
    """Write figures, picture and explanations of what is done, and print the tables."""
    results = read_results(folder)
    write_text(folder / RESULTS, json.dumps(record | {"results": _rounded(asdict(results))}, indent=1) + "\n")
    draw(results, folder / PICTURE)
    write_text(folder / EXAMPLES, examples_page(results.examples))
    print_report(results, console)
    console.print(f"The figures: {folder / RESULTS}; the picture: {folder / PICTURE}; examples: {folder / EXAMPLES}")


def record_of(name: str, seed: int, num_ranks: int) -> dict[str, Any]:
    """What the figures were made with: commands as for the default folder, sizes, versions, machine."""
    chain = stages(_FOLDER, SIZES[name], seed)
    packages = ("torch", "transformers", "megatron-core", "numpy", "gguf")
    return {
        "command": f"python -m tools.real.run {_FOLDER} --size {name} --seed {seed} --ranks {num_ranks}",
        "stages": {stage.name: _command(stage) for stage in (on_one_rank(chain) if num_ranks == 1 else chain)},
        "model": f"SmolLM2-135M-Instruct from {PACKAGE}",
        "size": {"name": name} | asdict(SIZES[name]),
        "seed": seed,
        "versions": {package: version(package) for package in packages},
        "machine": describe_machine(),
    }


def _command(stage: Stage) -> str:
    command, config, *overrides = stage.arguments
    return shlex.join(["megatron-rlt", command, str(Path(config).relative_to(_ROOT)), *overrides])


def _rounded(value: object) -> object:
    """The same with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
