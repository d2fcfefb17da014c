"""How often a model was right in an `evaluate` run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers on held-out questions."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Answers:
    """How often a model is right."""

    greedy: Accuracy
    sampled: Accuracy  # temperature 1, mean over several answers


def read_accuracy(run: Path) -> Accuracy:
    """Read `avg@k` of a finished run."""
    results = json.loads((run / "results.json").read_text())
    estimate = next(value for name, value in results.items() if name.startswith("avg@"))
    return Accuracy(estimate["mean"], estimate["standard_error"])
