"""Run every command on tiny inputs, and the demo up to its RL, and record all that equal code must give equally.

    python -m tools.bitequal.record OUT_FOLDER
    python -m tools.bitequal.record OUT_FOLDER --only tiny --at-once 1

`OUT_FOLDER/record.json` is what `tools.bitequal.compare` reads. Each command runs with one thread per rank: with more,
sums may be split otherwise. The folder must be new: a run that is found there would resume.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.bitequal.runs import Run, demo_groups, make_inputs, tiny_groups
from tools.bitequal.values import values_of

ROOT = Path(__file__).parents[2]
RECORD = "record.json"
_SHOWN_CHARACTERS = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder for all runs and record.json")
    parser.add_argument("--only", choices=["tiny", "demo"], help="leave the other runs out")
    parser.add_argument("--at-once", type=int, default=2, help="commands beside each other, most of two ranks")
    arguments = parser.parse_args()
    _check_package()
    out = arguments.out.resolve()
    out.mkdir(parents=True)
    make_inputs(out)
    groups = [] if arguments.only == "demo" else tiny_groups(out)
    groups += [] if arguments.only == "tiny" else demo_groups(out)
    runs: dict[str, Any] = {}
    for group in groups:
        with ThreadPoolExecutor(arguments.at_once) as pool:
            done = list(pool.map(_execute, group))
        runs |= {run.name: result for run, result in zip(group, done, strict=True)}
        (out / RECORD).write_text(json.dumps({"runs": runs}, indent=0) + "\n")
    failed = [name for name, run in runs.items() if run["values"]["status"] != 0]
    print(f"{out / RECORD}: {len(runs)} runs, {len(failed)} failed {failed}")
    return 1 if failed else 0


def _check_package() -> None:
    """An editable install of another tree must not be recorded in this one's name."""
    spec = importlib.util.find_spec("megatron_rlt")
    found = None if spec is None or spec.origin is None else Path(spec.origin)
    if found is None or not found.is_relative_to(ROOT):
        raise ValueError(f"megatron_rlt is imported from {found}, not from {ROOT}; set PYTHONPATH={ROOT}")


def _execute(run: Run) -> dict[str, Any]:
    """Run one command and read what it left; one that fails is recorded with its status."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rlt", *run.arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = round(time.monotonic() - start, 1)
    print(f"{run.name}: status {done.returncode}, {seconds} s", flush=True)
    if done.returncode != 0:
        print(done.stdout[-_SHOWN_CHARACTERS:], flush=True)
    return {"seconds": seconds, "values": {"status": done.returncode, **values_of(run)}}


if __name__ == "__main__":
    sys.exit(main())
