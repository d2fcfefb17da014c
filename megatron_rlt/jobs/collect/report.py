"""What `collect` leaves for training and for people: the selected rows as JSONL, and the closing table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlt.config.commands.collect import SelectionConfig
from megatron_rlt.data.shards import problem_to_json
from megatron_rlt.jobs.collect.selection import Candidate, Note, select
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.store.collected import PARTS, CollectedExplanation, read_collected, summarize_collected
from megatron_rlt.types import Problem

_LABELS = {
    "reward": "reward",
    "r_ss": "r_SS",
    "r_ss_mean": "  mean solution token",
    "r_ss_min": "  worst solution token",
    "r_kl": "r_KL",
    "r_kl_mean": "  mean explanation token",
    "r_kl_max": "  worst explanation token",
    "penalty": "penalty",
}


_PHASES = {"rollout": "sampled", "teacher": "teacher's scored", "student": "student's scored"}


@dataclass(frozen=True)
class SelectionReport:
    """What became of a selection."""

    file: Path
    num_questions: int
    num_rows: int
    notes: Counter[Note]  # questions by what had to be accepted
    mean_reward: float  # of the selected rows that have one; nan of none


def write_selection(explanations: Path, target: Path, selection: SelectionConfig) -> SelectionReport:
    """Write the selected explanations as training rows, whole file or none.

    Args:
        explanations: a finished Parquet file; all explanations of a question follow each other.
        target: JSONL with id, question, solution, reasoning_trace, which `prepare` and `sft` read.
    """
    notes: Counter[Note] = Counter()
    rewards: list[float] = []
    num_questions = num_rows = 0
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as file:
        for _, group in groupby(read_collected(explanations), key=lambda row: row.row):
            rows = list(group)
            choice = select([_candidate(row) for row in rows], selection)
            notes.update(choice.notes)
            chosen = [rows[index] for index in choice.indices]
            num_questions, num_rows = num_questions + 1, num_rows + len(chosen)
            rewards += [row.reward for row in chosen if row.reward is not None]
            for row in chosen:
                file.write(problem_to_json(_training_row(row, several=selection.rule == "all")) + b"\n")
    temporary.replace(target)
    return SelectionReport(target, num_questions, num_rows, notes, Tally.of(rewards).mean)


def print_collection(
    explanations: Path, report: SelectionReport, num_rejected: int | None, totals: Mapping[str, float], console: Console
) -> None:
    """Print the closing table.

    Args:
        num_rejected: rows of the data set that no prompt can be made of; None where they were not looked at again.
        totals: `seconds/<phase>` and `tokens/<phase>` of this start.
    """
    summary = summarize_collected(explanations)
    count = summary.num_explanations
    table = Table(title="Collection", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("questions", f"{summary.num_questions:,}")
    if num_rejected:
        table.add_row("rows rejected", f"{num_rejected:,}")
    table.add_row("explanations", f"{count:,}")
    table.add_row("  well-formed", _share(summary.num_well_formed, count))
    for flag, number in sorted(summary.flags.items()):
        table.add_row(f"  flagged {flag}", _share(number, count))
    table.add_row("tokens of an explanation", f"{summary.means['explanation_tokens']:,.1f}")
    table.add_row("tokens of a student sequence", f"{summary.means['student_tokens']:,.1f}")
    table.add_section()
    for name in PARTS:
        if not math.isnan(summary.means[name]):
            table.add_row(_LABELS[name], f"{summary.means[name]:.4f}")
    for reason, number in sorted(summary.dropped.items()):
        table.add_row(f"without a reward: {reason}", f"{number:,}")
    table.add_section()
    table.add_row("training rows selected", f"{report.num_rows:,}")
    if not math.isnan(report.mean_reward):
        table.add_row("  their reward", f"{report.mean_reward:.4f}")
    for note, number in sorted(report.notes.items()):
        table.add_row(f"  {note.value}", _share(number, report.num_questions))
    table.add_section()
    for phase, label in _PHASES.items():
        if totals.get(f"seconds/{phase}"):
            table.add_row(f"{label} tokens/s", f"{totals[f'tokens/{phase}'] / totals[f'seconds/{phase}']:,.0f}")
    console.print(table)
    console.print(f"Explanations: {explanations}", soft_wrap=True, highlight=False)
    console.print(f"Training rows: {report.file}", soft_wrap=True, highlight=False)


def _candidate(row: CollectedExplanation) -> Candidate:
    return Candidate(row.reward, row.student_tokens, well_formed=not row.flags, is_blank=not row.text.strip())


def _training_row(row: CollectedExplanation, *, several: bool) -> Problem:
    """A data set's ids are unique: where a question has several rows, the explanation's number is part of them."""
    problem = row.problem
    problem_id = f"{problem.problem_id}/{row.explanation_index}" if several else problem.problem_id
    return Problem(problem_id, problem.question, problem.solution, row.text)


def _share(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})"
