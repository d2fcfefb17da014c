"""The demo's numbers, read from what its stages wrote: RL curves, styles of explanations, right answers of students."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from tools.accuracy import Answers, read_accuracy
from tools.demo.chain_arithmetic import classify
from tools.demo.stages import OWN_RL, TRACES, evaluation_name, traces_file
from tools.rl_curves import RlCurves, Shares, read_rl_curves, style_shares
from tools.staged import read_seconds

RL_RUNS = ("rlt", "rlt_lambda0")


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
    return DemoResults(
        rl={
            name: read_rl_curves(folder / name, lambda row: classify(row.question, row.explanation))
            for name in RL_RUNS
            if (folder / name / "hf").exists()
        },
        students={name: _student(folder, name) for name in TRACES if _is_evaluated(folder, name)},
        own_rl={name: _answers(folder, name) for name in OWN_RL if _is_evaluated(folder, name)},
        seconds=read_seconds(folder),
    )


def _student(folder: Path, traces: str) -> Student:
    file = folder / "assets" / "train.jsonl" if traces == "original" else traces_file(folder, traces)
    return Student(
        answers=_answers(folder, traces),
        trace_styles=style_shares(classify(row["question"], row["reasoning_trace"]) for row in _rows(file)),
        loss=[step["loss"] for step in read_metrics(folder / f"student_{traces}")],
    )


def _is_evaluated(folder: Path, name: str) -> bool:
    return (folder / evaluation_name(name, greedy=False) / "results.json").exists()


def _answers(folder: Path, name: str) -> Answers:
    return Answers(*(read_accuracy(folder / evaluation_name(name, greedy=greedy)) for greedy in (True, False)))


def _rows(file: Path) -> Sequence[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
