"""Kills, full disks, second starts, crafted and malformed files, sockets, server faults: the table of reliability.

    python -m tools.chaos.campaign runs/chaos --out docs/results/chaos.json
    python -m tools.chaos.campaign runs/chaos --only 'forked/sft-*' 'disk/*' --seconds 600

Commands run on tiny random models, as real processes. Every disturbance is one unit, drawn from the seed and the unit's
name. What the JSON file holds already is not done again, so that a campaign that was cut goes on. The roots of units
that failed stay in the folder. Exit status 1 if any unit failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from megatron_rlt.whole_files import write_text
from tools.chaos.table import markdown, num_kills, rows
from tools.chaos.units import Amounts, Campaign, Record, Unit


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/chaos"), help="inputs and run folders")
    parser.add_argument("--out", type=Path, help="the JSON file; default: chaos.json in the folder")
    parser.add_argument("--seed", type=int, default=0, help="of all moments and sizes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further unit after so long")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="units whose names match")
    for amount in fields(Amounts):
        option = f"--{amount.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=amount.default, help="default: %(default)s")
    given = parser.parse_args(arguments)
    amounts = Amounts(**{amount.name: getattr(given, amount.name) for amount in fields(Amounts)})
    folder = given.folder.resolve()
    file = given.out or folder / "chaos.json"
    head = {"seed": given.seed, "amounts": asdict(amounts)}
    units = _run(Campaign(folder, given.seed, amounts).units(), given.only, given.seconds, file, head)
    print(markdown(rows(units)))
    for name, record in units.items():
        for fault in record["faults"]:
            print(f"FAILED {name}: {fault}", file=sys.stderr)
    print(f"{len(units)} units, {num_kills(units)} SIGKILLs; written: {file}")
    return int(any(record["faults"] for record in units.values()))


def _run(
    all_units: Iterable[Unit], patterns: Sequence[str], seconds: float, file: Path, head: dict[str, Any]
) -> dict[str, Record]:
    """Run what matches and is not done; the file is written after every unit."""
    done, deadline = _read(file, head), time.monotonic() + seconds
    for unit in all_units:
        if unit.name in done or not any(fnmatch.fnmatchcase(unit.name, pattern) for pattern in patterns):
            continue
        if time.monotonic() > deadline:
            print(f"Cut after {seconds:.0f} s: the same command goes on", file=sys.stderr)
            break
        begun = time.monotonic()
        record = unit.run()
        done[unit.name] = record | {"seconds": round(time.monotonic() - begun, 1)}
        print(f"{unit.name}: {json.dumps(done[unit.name])}", flush=True)
        _write(file, head, done)
    return done


def _read(file: Path, head: dict[str, Any]) -> dict[str, Record]:
    """Units that are done and were no failure; none where they were drawn otherwise."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    units: dict[str, Record] = found["units"] if _drawn_by(found) == _drawn_by(head) else {}
    return {name: record for name, record in units.items() if not record["faults"]}


def _drawn_by(head: dict[str, Any]) -> list[int]:
    """What a unit's moments depend on beside its name; how many units there are is no part of it."""
    return [head["seed"], *(head["amounts"][name] for name in ("kills_per_forked_life", "kills_per_whole_life"))]


def _write(file: Path, head: dict[str, Any], units: dict[str, Record]) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    content = {"command": "python -m tools.chaos.campaign", **head, "machine": machine, "kills": num_kills(units)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content | {"units": units}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
