"""What `collect` and `score` leave for training and for people: selected rows as JSONL, and the closing table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console

from megatron_rlt.config.commands.collect import SelectionConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.data.shards import problem_to_json
from megatron_rlt.jobs.collect.scoring import GAIN_LABELS
from megatron_rlt.jobs.collect.selection import Candidate, Note, select
from megatron_rlt.jobs.run.validate_rows import RowReport
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations, summarize_explanations
from megatron_rlt.types import Problem
from megatron_rlt.visible_text import is_blank
from megatron_rlt.whole_files import replacing

_LENGTHS = {"explanation_tokens": "tokens of an explanation", "student_tokens": "tokens of a student sequence"}
_VALUES = {"reward": "reward", **LABELS, **GAIN_LABELS}
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
    """Write the selected explanations as training rows, JSONL for `prepare` and `sft`, whole file or none.

    `explanations`: a finished Parquet file; all explanations of a question follow each other.
    """
    notes: Counter[Note] = Counter()
    rewards: list[float] = []
    num_questions = num_rows = 0
    rows = read_explanations(explanations, with_tokens=False)
    with replacing(target) as file:
        for _, group in groupby(rows, key=lambda row: row.question_index):
            found = list(group)
            choice = select([_candidate(row) for row in found], selection)
            notes.update(choice.notes)
            chosen = [found[index] for index in choice.indices]
            num_questions, num_rows = num_questions + 1, num_rows + len(chosen)
            rewards += [row.reward for row in chosen if row.reward is not None]
            for row in chosen:
                file.write(problem_to_json(_training_row(row, several=selection.rule == "all")) + b"\n")
    return SelectionReport(target, num_questions, num_rows, notes, Tally.of(rewards).mean)


def print_explanations(
    title: str,
    explanations: Path,
    rejected: RowReport | None,
    selection: SelectionReport | None,
    totals: Mapping[str, float],
    files: Mapping[str, Path],
) -> None:
    """Print the closing table of a finished Parquet file, and where `files` lie.

    `rejected` and `selection`: None if unknown; `totals`: `seconds/<phase>` and `tokens/<phase>` of this start.
    """
    table = NumberTable(title)
    for section in (
        _rows_of_explanations(explanations, rejected),
        () if selection is None else _rows_of_selection(selection),
        _rows_of_rates(totals),
    ):
        for row in section:
            table.add_line(*row)
        table.add_section()
    console = Console()
    console.print(table)
    for name, file in files.items():
        console.print(f"{name}: {file}", soft_wrap=True, highlight=False)


def _rows_of_explanations(explanations: Path, rejected: RowReport | None) -> Iterator[tuple[str, str]]:
    """Means are over the explanations that have a finite value."""
    summary = summarize_explanations(explanations, (*_VALUES, *_LENGTHS))
    count = summary.num_explanations
    yield "questions", f"{summary.num_questions:,}"
    if rejected is not None:
        yield "rows rejected", f"{len(rejected.rejected):,}"
        yield from ((f"  {reason}", f"{number:,}") for reason, number in sorted(rejected.counts.items()))
    yield "explanations", f"{count:,}"
    yield from ((f"  without a reward: {reason}", f"{number:,}") for reason, number in sorted(summary.dropped.items()))
    yield "  well-formed", _share(summary.num_well_formed, count)
    yield from ((f"  flagged {flag}", _share(number, count)) for flag, number in sorted(summary.flags.items()))
    yield from ((label, f"{summary.means[name]:,.1f}") for name, label in _LENGTHS.items())
    for name, label in _VALUES.items():
        if not math.isnan(summary.means[name]):
            yield label, f"{summary.means[name]:.4f}"


def _rows_of_selection(report: SelectionReport) -> Iterator[tuple[str, str]]:
    yield "training rows selected", f"{report.num_rows:,}"
    if not math.isnan(report.mean_reward):
        yield "  their reward", f"{report.mean_reward:.4f}"
    yield from (
        (f"  {note.value}", _share(number, report.num_questions)) for note, number in sorted(report.notes.items())
    )


def _rows_of_rates(totals: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for phase, label in _PHASES.items():
        if seconds := totals.get(f"seconds/{phase}"):
            yield f"{label} tokens/s", f"{totals[f'tokens/{phase}'] / seconds:,.0f}"


def _candidate(row: StoredExplanation) -> Candidate:
    return Candidate(row.reward, row.student_tokens, well_formed=not row.flags, is_blank=is_blank(row.explanation))


def _training_row(row: StoredExplanation, *, several: bool) -> Problem:
    """A data set's ids are unique: where a question has several rows, the explanation's number is part of them."""
    return Problem(
        f"{row.id}/{row.explanation_index}" if several else row.id, row.question, row.solution, row.explanation
    )


def _share(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})"
