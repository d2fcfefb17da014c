"""Compares log-probs that backends compute for the same tokens, per pair of backends, and prints the differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from megatron_rlt.algorithm.rollout_mismatch import quantile, rollout_gap
from megatron_rlt.config.display import NumberTable
from megatron_rlt.types import SpannedSequence
from megatron_rlt.visible_text import one_line

_CONTEXT_TOKENS = 12  # shown before the worst token


@dataclass(frozen=True, eq=False)
class Backend:
    """Log-probs by one backend for the target tokens of all sequences."""

    name: str
    logprobs: tuple[Tensor, ...]  # [N_i] float32 each


@dataclass(frozen=True, eq=False)
class Comparison:
    """One model's tokens, and their log-probs by each backend."""

    model: str  # its configuration section
    problem_ids: tuple[str, ...]  # one per sequence
    sequences: tuple[SpannedSequence, ...]
    decode: Callable[[Sequence[int]], str]
    sides: tuple[Backend, ...]


@dataclass(frozen=True)
class LogprobDiff:
    """|difference| of two backends' log-probs over all tokens, in nats."""

    model: str
    sides: tuple[str, str]
    num_tokens: int
    p50: float
    p99: float
    maximum: float  # NaN if any value is
    problem_id: str  # of the worst token, as all fields below
    position: int  # in the sequence
    token: str
    context: str  # up to that token
    values: tuple[float, float]  # log-prob by each backend


def pair_gaps(comparison: Comparison) -> list[LogprobDiff]:
    """Compare every pair of backends."""
    return [_pair_gap(comparison, left, right) for left, right in combinations(comparison.sides, 2)]


def print_gaps(gaps: Sequence[LogprobDiff], *, max_gap: float, console: Console) -> None:
    """Print the table, then the worst token of every pair with its context."""
    headings = ("model", "between", "tokens", "p50", "p99", "max", "")
    table = NumberTable("Differences of log-probs, nats", headings, text_columns=2)
    for gap in gaps:
        numbers = (f"{value:.2e}" for value in (gap.p50, gap.p99, gap.maximum))
        verdict = "" if gap.maximum <= max_gap else f"above {max_gap:g}"
        table.add_line(gap.model, " - ".join(gap.sides), f"{gap.num_tokens:,}", *numbers, verdict)
    console.print(table)
    for gap in gaps:
        (left, right), (ours, theirs) = gap.sides, gap.values
        console.print(
            f"\n{gap.model}, {left} - {right}: worst at token {gap.position} of problem"
            f" {escape(one_line(gap.problem_id))}:"
            f" {left} {ours:.6f}, {right} {theirs:.6f}\n  ...{escape(repr(gap.context)[1:-1])}"
            f" -> {escape(repr(gap.token))}",
            highlight=False,
            soft_wrap=True,
        )


def _pair_gap(comparison: Comparison, left: Backend, right: Backend) -> LogprobDiff:
    gap = rollout_gap(left.logprobs, right.logprobs)
    sequence = comparison.sequences[gap.worst_completion]
    position = int(sequence.target_positions[gap.worst_token])
    ids: list[int] = sequence.token_ids.tolist()

    def worst(backend: Backend) -> float:
        return float(backend.logprobs[gap.worst_completion][gap.worst_token])

    differences = (torch.cat(left.logprobs) - torch.cat(right.logprobs)).abs()
    return LogprobDiff(
        model=comparison.model,
        sides=(left.name, right.name),
        num_tokens=len(differences),
        p50=quantile(differences, 0.5),
        p99=gap.p99,
        maximum=gap.maximum,
        problem_id=comparison.problem_ids[gap.worst_completion],
        position=position,
        token=comparison.decode([ids[position]]),
        context=comparison.decode(ids[max(0, position - _CONTEXT_TOKENS) : position]),
        values=(worst(left), worst(right)),
    )
