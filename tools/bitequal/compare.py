"""Compare two records: one line per run that is equal, the first differences of every other.

python -m tools.bitequal.compare BEFORE AFTER [--show 5]

BEFORE and AFTER are `record.json` files, or folders that hold one. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

# Names of BEFORE that AFTER calls otherwise: pattern (re.sub on the whole name) and replacement.
RENAMED: dict[str, str] = {
    "groups_with_spread$": "groups_with_signal",
    "/teacher_prompt_ids$": "/prompt_ids",
    "/placebo_ids$": "/control_ids",
    "/dropped_rows$": "/dropped",
    "placebo_": "control_",
}
# Names of BEFORE that AFTER no longer has: patterns of re.match. Names that only AFTER has are not compared.
LEFT_OUT: tuple[str, ...] = (r"metrics/.*/(tokens|model_flops)/(baseline|student)$",)
_ABSENT = "(absent)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--show", type=int, default=5, help="differences shown per run")
    arguments = parser.parse_args()
    before = {re.sub("placebo", "control", name): run for name, run in _runs(arguments.before).items()}
    after = _runs(arguments.after)
    num_different = 0
    for name in dict.fromkeys((*before, *after)):
        if name not in before or name not in after:
            num_different += 1
            print(f"DIFFERENT {name}: only in {'BEFORE' if name in before else 'AFTER'}")
            continue
        old, new = _names(before[name]["values"], RENAMED), _names(after[name]["values"], {})
        found = differences(old, new)
        num_different += bool(found)
        print(f"DIFFERENT {name}: {len(found)} of {len(old)} values" if found else f"equal {name}: {len(old)} values")
        for line in found[: arguments.show]:
            print(f"    {line}")
    print(f"{num_different} runs differ" if num_different else "all runs are equal")
    return 1 if num_different else 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per name whose values differ; floats are equal only with all their bits."""
    pairs = ((name, old, after.get(name, _ABSENT)) for name, old in before.items())
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if repr(old) != repr(new)]


def _runs(path: Path) -> dict[str, Any]:
    file = path / "record.json" if path.is_dir() else path
    runs: dict[str, Any] = json.loads(file.read_text())["runs"]
    return runs


def _names(values: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    for pattern, replacement in renamed.items():
        values = {re.sub(pattern, replacement, name): value for name, value in values.items()}
    return {name: value for name, value in values.items() if not any(re.match(pattern, name) for pattern in LEFT_OUT)}


if __name__ == "__main__":
    sys.exit(main())
