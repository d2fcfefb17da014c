"""How far programs that should give the same log-probs differ, pair by pair, with the place where they differ most.

In: one `Side` a program. Out: `PairGap` records, and the table that a person reads. A further engine is one more side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from megatron_rlt.algorithm.rollout_mismatch import quantile, rollout_gap
from megatron_rlt.types import SpannedSequence

_CONTEXT_TOKENS = 12  # before the worst token: enough to see where in a text it stands


@dataclass(frozen=True, eq=False)
class Side:
    """What one program says of the wanted tokens of all sequences."""

    name: str
    logprobs: tuple[Tensor, ...]  # [N_i] float32 each


@dataclass(frozen=True, eq=False)
class Contest:
    """One model's tokens, and all programs that were asked for their log-probs."""

    model: str  # by its section's name
    problem_ids: tuple[str, ...]  # one a sequence
    sequences: tuple[SpannedSequence, ...]
    decode: Callable[[Sequence[int]], str]
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class PairGap:
    """|difference| of two sides' log-probs over all tokens, in nats."""

    model: str
    sides: tuple[str, str]
    num_tokens: int
    p50: float
    p99: float
    maximum: float  # nan where any value is
    problem_id: str  # of the worst token; all below too
    position: int  # in the sequence
    token: str
    context: str  # up to that token
    values: tuple[float, float]  # each side's log-prob


def pair_gaps(contest: Contest) -> list[PairGap]:
    """Every pair of sides."""
    return [_pair_gap(contest, left, right) for left, right in combinations(contest.sides, 2)]


def print_gaps(gaps: Sequence[PairGap], *, max_gap: float, console: Console) -> None:
    """The table, then the worst context of every pair."""
    table = Table(title="Differences of log-probs, nats", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("model", "between"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "p50", "p99", "max", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for gap in gaps:
        numbers = (f"{value:.2e}" for value in (gap.p50, gap.p99, gap.maximum))
        verdict = "" if gap.maximum <= max_gap else f"above {max_gap:g}"
        table.add_row(gap.model, " - ".join(gap.sides), f"{gap.num_tokens:,}", *numbers, verdict)
    console.print(table)
    for gap in gaps:
        (left, right), (ours, theirs) = gap.sides, gap.values
        console.print(
            f"\n{gap.model}, {left} - {right}: worst at token {gap.position} of problem {escape(gap.problem_id)}:"
            f" {left} {ours:.6f}, {right} {theirs:.6f}\n  ...{escape(repr(gap.context)[1:-1])}"
            f" -> {escape(repr(gap.token))}",
            highlight=False,
            soft_wrap=True,
        )


def _pair_gap(contest: Contest, left: Side, right: Side) -> PairGap:
    gap = rollout_gap(left.logprobs, right.logprobs)
    sequence = contest.sequences[gap.worst_completion]
    position = int(sequence.target_positions[gap.worst_token])
    ids: list[int] = sequence.token_ids.tolist()
    differences = (torch.cat(left.logprobs) - torch.cat(right.logprobs)).abs()
    return PairGap(
        model=contest.model,
        sides=(left.name, right.name),
        num_tokens=len(differences),
        p50=quantile(differences, 0.5),
        p99=gap.p99,
        maximum=gap.maximum,
        problem_id=contest.problem_ids[gap.worst_completion],
        position=position,
        token=contest.decode([ids[position]]),
        context=contest.decode(ids[max(0, position - _CONTEXT_TOKENS) : position]),
        values=(
            float(left.logprobs[gap.worst_completion][gap.worst_token]),
            float(right.logprobs[gap.worst_completion][gap.worst_token]),
        ),
    )
