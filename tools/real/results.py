"""The figures of `make real`, read from what its stages wrote; what has not run is left out."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations
from tools.accuracy import Accuracy, read_accuracy
from tools.real.layouts import LayoutGap, read_layout_gaps
from tools.real.problems import Style, answer_of, style_of
from tools.real.stages import RL, STUDENTS, TEACHERS, UNTAUGHT, evaluation_folder, rewards_file, traces_file
from tools.rl_curves import RlCurves, Shares, read_rl_curves, style_shares
from tools.staged import read_seconds

PARTS = ("reward", "r_ss", "r_kl", "penalty", "gain")
"""Of a held-out explanation: its reward with its parts, and what it adds to the solution's mean log-prob."""
STYLE_PARTS = ("reward", "r_ss", "r_kl", "advantage")
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Mean:
    """Over explanations, with its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class HeldOut:
    """A teacher's explanations of held-out questions."""

    num_questions: int
    parts: dict[str, Mean]  # of `PARTS`
    control: dict[str, Mean]  # of `PARTS` but the gain, with another question's explanation in each one's place
    styles: Shares
    mean_tokens: float


@dataclass(frozen=True)
class OfStyle:
    """All explanations of RL of one kind."""

    num_explanations: int
    means: dict[str, float]  # of `STYLE_PARTS`


@dataclass(frozen=True)
class Student:
    """A distilled student, what it learned from, and how often it is right; None: not asked."""

    greedy: Accuracy | None
    sampled: Accuracy | None
    trace_styles: Shares
    loss: list[float]  # one a step


@dataclass(frozen=True)
class Example:
    """One held-out question explained before and after RL."""

    question: str
    solution: str
    explanations: dict[str, str]  # by teacher
    parts: dict[str, dict[str, float]]  # by teacher, of `PARTS`


@dataclass(frozen=True)
class RealResults:
    """All that the tables, the picture, the page and the JSON file are made from."""

    layouts: list[LayoutGap]
    losses: dict[str, list[float]]  # of the frozen student's and the teacher's warm-up, one a step
    rl: RlCurves | None
    by_style: dict[str, OfStyle]  # of RL's explanations; a style that does not occur is left out
    by_last_number: dict[str, OfStyle]  # the same by whether the last number written is the answer: right, wrong
    held_out: dict[str, HeldOut]  # by teacher
    changes: dict[str, Mean]  # of `PARTS`, the RL teacher's less the warm teacher's, question by question
    reward_changes: dict[str, Mean]  # by whether the warm teacher leapt: leapt, explained
    untaught: Accuracy | None  # the model before it is distilled, greedy
    students: dict[str, Student]  # by what they are distilled on
    examples: list[Example]
    seconds: dict[str, float]  # wall time by stage


def read_results(folder: Path) -> RealResults:
    """Read a folder of `make real`, whole or not."""
    rewards = {name: _rewards(folder / rewards_file(name, control=False)) for name in TEACHERS}
    rewards = {name: rows for name, rows in rewards.items() if rows}
    both = len(rewards) == len(TEACHERS)
    return RealResults(
        layouts=read_layout_gaps(folder),
        losses={name: _losses(folder / name) for name in ("scorer", "warmup") if (folder / name / "hf").exists()},
        rl=read_rl_curves(folder / RL, _style) if (folder / RL / "hf").exists() else None,
        by_style=_grouped(folder / RL / "completions", lambda row: _style(row).value),
        by_last_number=_grouped(folder / RL / "completions", _last_number),
        held_out={name: _held_out(folder, name, rows) for name, rows in rewards.items()},
        changes=_changes(*rewards.values()) if both else {},
        reward_changes=_reward_changes(*rewards.values()) if both else {},
        untaught=_accuracy(folder, UNTAUGHT, greedy=True),
        students={name: _student(folder, name) for name in STUDENTS if (folder / f"student_{name}" / "hf").exists()},
        examples=_examples(rewards) if both else [],
        seconds=read_seconds(folder),
    )


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error; nan without a second value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error)


def _losses(run: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(run)]


def _rewards(file: Path) -> list[StoredExplanation]:
    return list(read_explanations(file, with_tokens=False)) if file.is_file() else []


def _style(row: StoredExplanation) -> Style:
    return style_of(row.question, answer_of(row.solution), row.explanation)


def _last_number(row: StoredExplanation) -> str:
    written = re.findall(r"\d+", row.explanation)
    return "right" if written and written[-1] == answer_of(row.solution) else "wrong"


def _grouped(completions: Path, group: Callable[[StoredExplanation], str]) -> dict[str, OfStyle]:
    """Rewards of the explanations of all steps, whose questions differ; advantages are within a question."""
    found: dict[str, list[StoredExplanation]] = {}
    for file in sorted(completions.glob("step-*.parquet")):
        for row in _rewards(file):
            if not math.isnan(_part(row, "reward")):
                found.setdefault(group(row), []).append(row)
    return {
        name: OfStyle(len(rows), {part: statistics.fmean(_part(row, part) for row in rows) for part in STYLE_PARTS})
        for name, rows in sorted(found.items())
    }


def _part(row: StoredExplanation, name: str) -> float:
    value = getattr(row, name) if name in ("reward", "gain", "advantage") else (row.terms or {})[name]
    return math.nan if value is None else float(value)


def _held_out(folder: Path, name: str, rows: list[StoredExplanation]) -> HeldOut:
    rewarded = [row for row in rows if not math.isnan(_part(row, "reward"))]
    control = _rewards(folder / rewards_file(name, control=True))
    return HeldOut(
        num_questions=len(rows),
        parts={part: mean_of([_part(row, part) for row in rewarded]) for part in PARTS},
        control={part: mean_of([_part(row, part) for row in control]) for part in PARTS if control and part != "gain"},
        styles=style_shares(map(_style, rows)),
        mean_tokens=statistics.fmean(row.explanation_tokens for row in rows),
    )


def _pairs(
    before: list[StoredExplanation], after: list[StoredExplanation]
) -> list[tuple[StoredExplanation, StoredExplanation]]:
    """Explanations of the same question."""
    found = {row.id: row for row in after}
    return [(row, found[row.id]) for row in before if row.id in found]


def _changes(before: list[StoredExplanation], after: list[StoredExplanation]) -> dict[str, Mean]:
    """Paired by question."""
    pairs = _pairs(before, after)
    return {part: mean_of([_part(new, part) - _part(old, part) for old, new in pairs]) for part in PARTS}


def _reward_changes(before: list[StoredExplanation], after: list[StoredExplanation]) -> dict[str, Mean]:
    changes: dict[str, list[float]] = {}
    for old, new in _pairs(before, after):
        how = "leapt" if _style(old) is Style.LEAP else "explained"
        changes.setdefault(how, []).append(_part(new, "reward") - _part(old, "reward"))
    return {how: mean_of(values) for how, values in changes.items()}


def _examples(rewards: dict[str, list[StoredExplanation]]) -> list[Example]:
    """The first questions that all teachers explained: not picked."""
    by_id = {name: {row.id: row for row in rows} for name, rows in rewards.items()}
    first, *others = by_id.values()
    shared = [row for key, row in first.items() if all(key in other for other in others)]
    return [
        Example(
            row.question,
            row.solution,
            {name: rows[row.id].explanation for name, rows in by_id.items()},
            {name: {part: _part(rows[row.id], part) for part in PARTS} for name, rows in by_id.items()},
        )
        for row in shared[:NUM_EXAMPLES]
    ]


def _student(folder: Path, name: str) -> Student:
    rows = [json.loads(line) for line in (folder / traces_file(name)).read_text(encoding="utf-8").splitlines()]
    styles = (style_of(row["question"], answer_of(row["solution"]), row["reasoning_trace"]) for row in rows)
    return Student(
        greedy=_accuracy(folder, name, greedy=True),
        sampled=_accuracy(folder, name, greedy=False),
        trace_styles=style_shares(styles),
        loss=_losses(folder / f"student_{name}"),
    )


def _accuracy(folder: Path, name: str, *, greedy: bool) -> Accuracy | None:
    run = folder / evaluation_folder(name, greedy=greedy)
    return read_accuracy(run) if (run / "results.json").is_file() else None
