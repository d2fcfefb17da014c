"""The demo's numbers, read from what its stages wrote: RL curves, styles of explanations, right answers of students."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanations import read_explanations
from tools.demo.chain_arithmetic import Style, classify
from tools.demo.stages import OWN_RL, TRACES, evaluation_name, traces_file

NUM_FIRST, NUM_LAST = 3, 5  # steps whose means stand for before and after; the first is sampled before any update
CURVES = ("reward", "r_ss", "r_kl", "well_formed_share", "rollout_gap_max")
RL_RUNS = ("rlt", "rlt_lambda0")

Shares = dict[str, float]  # of explanations, by style


@dataclass(frozen=True)
class RlCurves:
    """One RL run, step by step."""

    curves: dict[str, list[float]]  # of `CURVES`, one value a step
    styles: list[Shares]  # one a step

    def ends(self, name: str) -> tuple[float, float]:
        """Mean of a curve over the first and over the last steps."""
        values = self.curves[name]
        return statistics.fmean(values[:NUM_FIRST]), statistics.fmean(values[-NUM_LAST:])

    def style_ends(self, style: Style) -> tuple[float, float]:
        """A style's share in the first and in the last steps."""
        shares = [of_step[style.value] for of_step in self.styles]
        return statistics.fmean(shares[:NUM_FIRST]), statistics.fmean(shares[-NUM_LAST:])


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers on held-out questions."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Answers:
    """How often a model is right."""

    greedy: Accuracy
    sampled: Accuracy  # temperature 1, mean over four answers


@dataclass(frozen=True)
class Student:
    """A distilled student and what it learned from."""

    answers: Answers
    trace_styles: Shares
    loss: list[float]  # one a step


@dataclass(frozen=True)
class DemoResults:
    """All that the demo's closing table, picture and results file are made from."""

    rl: dict[str, RlCurves]  # of `RL_RUNS`, those that were made
    students: dict[str, Student]  # by the explanations they learned from, see `stages.TRACES`
    own_rl: dict[str, Answers]  # of `stages.OWN_RL`, before and after a student's own RL
    seconds: dict[str, float]  # wall time by stage


def read_results(folder: Path) -> DemoResults:
    """Read a demo's folder; what was not run (the ablation) is left out."""
    questions = {row["id"]: row["question"] for row in _rows(folder / "assets" / "train.jsonl")}
    return DemoResults(
        rl={name: _rl_curves(folder / name, questions) for name in RL_RUNS if (folder / name / "hf").exists()},
        students={name: _student(folder, name) for name in TRACES if _is_evaluated(folder, name)},
        own_rl={name: _answers(folder, name) for name in OWN_RL if _is_evaluated(folder, name)},
        seconds=json.loads((folder / "stages.json").read_text()),
    )


def _rl_curves(run: Path, questions: dict[str, str]) -> RlCurves:
    steps = read_metrics(run)
    styles = []
    for step in steps:
        rows = read_explanations(run / "completions" / f"step-{int(step['step']):06d}.parquet", with_tokens=False)
        styles.append(style_shares((questions[row.id], row.explanation) for row in rows))
    return RlCurves({name: [step[name] for step in steps] for name in CURVES}, styles)


def _student(folder: Path, traces: str) -> Student:
    file = folder / "assets" / "train.jsonl" if traces == "original" else traces_file(folder, traces)
    return Student(
        answers=_answers(folder, traces),
        trace_styles=style_shares((row["question"], row["reasoning_trace"]) for row in _rows(file)),
        loss=[step["loss"] for step in read_metrics(folder / f"student_{traces}")],
    )


def style_shares(explained: Iterable[tuple[str, str]]) -> Shares:
    """Share of each style among pairs of question and explanation."""
    counts = Counter(classify(question, explanation) for question, explanation in explained)
    return {style.value: counts[style] / counts.total() for style in Style}


def _is_evaluated(folder: Path, name: str) -> bool:
    return (folder / evaluation_name(name, greedy=False) / "results.json").exists()


def _answers(folder: Path, name: str) -> Answers:
    return Answers(*(_accuracy(folder / evaluation_name(name, greedy=greedy)) for greedy in (True, False)))


def _accuracy(run: Path) -> Accuracy:
    results = json.loads((run / "results.json").read_text())
    estimate = next(value for name, value in results.items() if name.startswith("avg@"))
    return Accuracy(estimate["mean"], estimate["standard_error"])


def _rows(file: Path) -> Sequence[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
