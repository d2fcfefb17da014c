"""How the package's verdicts agree with verdicts by hand, as the table of `docs/verdicts.md`.

    python -m tools.verdicts                 prints the table

The pairs lie in `tests/rewards/verdict_pairs.jsonl`; a test keeps the page in step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from megatron_rlt.rewards.verifiable import VerifiableKind, Verifier
from megatron_rlt.types import Problem

PAIRS = Path(__file__).parents[1] / "tests" / "rewards" / "verdict_pairs.jsonl"
_HEADER = (
    "| kind | about | pairs | agree | false accepts | false rejects | row refused |\n|---|---|---|---|---|---|---|\n"
)
_OUTCOMES = ("agree", "false accept", "false reject", "refused")


def read_pairs(kind: VerifiableKind) -> Iterator[dict[str, Any]]:
    """The pairs of one kind: `about`, `question`, `reference`, `answer`, and whether the answer is `right`."""
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        if pair["kind"] == kind:
            yield pair


def outcome(verifier: Verifier, pair: dict[str, Any]) -> str:
    """One of the outcomes; a row that is refused has no verdict to agree with."""
    problem = Problem("pair", pair["question"], pair["reference"])
    try:
        verifier.check(problem)
    except ValueError:
        return "refused"
    correct = verifier.verdict(problem, pair["answer"]).correct
    return "agree" if correct == pair["right"] else "false accept" if correct else "false reject"


def agreement_table() -> str:
    """The counts in Markdown, one row for each kind and topic, and their sum."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for kind in get_args(VerifiableKind):
        with Verifier(kind, tags=None, timeout_seconds=20.0) as verifier:
            for pair in read_pairs(kind):
                counts.setdefault((kind, pair["about"]), Counter())[outcome(verifier, pair)] += 1
    rows = [_row(*names, count) for names, count in counts.items()]
    return _HEADER + "".join(rows) + _row("all", "", sum(counts.values(), Counter()))


def _row(kind: str, about: str, count: Counter[str]) -> str:
    cells = (kind, about, count.total(), *(count[outcome] for outcome in _OUTCOMES))
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


if __name__ == "__main__":
    print(agreement_table(), end="")
