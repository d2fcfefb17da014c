"""An RL run step by step: its curves, and the styles of the explanations that it sampled."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations

NUM_FIRST, NUM_LAST = 3, 5  # steps whose means stand for before and after; the first is sampled before any update
CURVES = ("reward", "r_ss", "r_kl", "well_formed_share", "rollout_gap_max")

Shares = dict[str, float]  # of explanations, by style


@dataclass(frozen=True)
class RlCurves:
    """One RL run, step by step."""

    curves: dict[str, list[float]]  # of `CURVES`, one value a step
    styles: list[Shares]  # one a step

    def ends(self, name: str) -> tuple[float, float]:
        """Mean of a curve over the first and over the last steps."""
        return self._ends(self.curves[name])

    def style_ends(self, style: StrEnum) -> tuple[float, float]:
        """A style's share in the first and in the last steps."""
        return self._ends([of_step[style.value] for of_step in self.styles])

    def _ends(self, values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values[:NUM_FIRST]), statistics.fmean(values[-NUM_LAST:])


def read_rl_curves(run: Path, style_of: Callable[[StoredExplanation], StrEnum]) -> RlCurves:
    """Read a run of `train`; `style_of` tells the style of a stored explanation."""
    steps = read_metrics(run)
    styles = []
    for step in steps:
        rows = read_explanations(run / "completions" / f"step-{int(step['step']):06d}.parquet", with_tokens=False)
        styles.append(style_shares(map(style_of, rows)))
    return RlCurves({name: [step[name] for step in steps] for name in CURVES}, styles)


def style_shares(styles: Iterable[StrEnum]) -> Shares:
    """Share of each style of their kind, also of those that do not occur; there must be at least one."""
    counts = Counter(styles)
    return {style.value: counts[style] / counts.total() for style in type(next(iter(counts)))}
