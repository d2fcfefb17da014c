"""`score` with a control in the explanation's place gives the scores of a file that holds the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.prompts.pairs import pair_builder
from megatron_rlt.rewards.control import other_questions
from megatron_rlt.types import Problem
from tests.jobs.tiny_scores import PhaseLog, ScoreInputs, score_inputs, score_on_ranks, write_rows
from tests.ranks import run_ranks

SEED = 3
# Two explanations of the second question; the last one is empty.
TEXTS = (
    ("What is one and one?", "2", "One and one are two."),
    ("What is two and three?", "5", "First we count to two, then on to five."),
    ("What is two and three?", "5", "Five."),
    ("What is four and four?", "8", "So the answer is eight."),
    ("What is five and four?", "9", ""),
)
OF_THE_CONTENT = ("r_ss", "r_ss_min", "r_kl", "student_solution_logprobs", "student_explanation_logprobs")


def _score(configs: list[ScoreConfig]) -> list[int]:
    return [score_on_ranks(config, PhaseLog()) for config in configs]


def _rows(texts: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    names = ("question", "solution", "explanation")
    return [{"id": str(number), **dict(zip(names, text, strict=True))} for number, text in enumerate(texts)]


def test_controls_are_scored_in_place_of_the_explanations(tmp_path: Path) -> None:
    inputs = score_inputs(tmp_path, traces=())
    places = other_questions([question for question, _, _ in TEXTS], seed=SEED)
    by_hand = [
        (question, solution, TEXTS[place][2]) for (question, solution, _), place in zip(TEXTS, places, strict=True)
    ]
    files = {
        "own": write_rows(tmp_path / "own.jsonl", _rows(list(TEXTS))),
        "others": write_rows(tmp_path / "others.jsonl", _rows(by_hand)),
        "empty": write_rows(tmp_path / "empty.jsonl", _rows([(q, s, "") for q, s, _ in TEXTS])),
    }
    controls = ("none", "other_question", "no_explanation", "shuffled")
    configs = [
        *(inputs.config(tmp_path / name, input=files["own"], control=name, seed=SEED) for name in controls),
        *(inputs.config(tmp_path / name, input=files[name], baseline=False) for name in ("others", "empty")),
    ]

    assert run_ranks(_score, 1, configs) == [[0] * len(configs)]

    own, other, nothing, shuffled, expected_other, expected_nothing = (_read(config) for config in configs)
    assert _content(other) == _content(expected_other) != _content(own)
    assert _content(nothing) == _content(expected_nothing)
    assert [row["explanation_tokens"] for row in shuffled] == [row["explanation_tokens"] for row in own]
    assert all(a["r_ss"] != b["r_ss"] for a, b in zip(shuffled, own, strict=True) if a["explanation_tokens"] > 2)
    assert [row["flags"] for row in other] == [row["flags"] for row in own]
    assert [len(row["control_ids"]) for row in shuffled] == [row["explanation_tokens"] for row in own]
    assert all(row["control_ids"] is None for row in own)
    assert {(row["baseline_logprob"], row["gain"]) for row in expected_nothing} == {(None, None)}
    _check_baseline(own, nothing)
    assert _student_tokens(configs[0], own) == _expected_tokens(inputs, configs[0])


def _check_baseline(own: list[dict[str, Any]], nothing: list[dict[str, Any]]) -> None:
    """The baseline is what a run without explanations gives; an empty explanation gains nothing."""
    for row, without in zip(own, nothing, strict=True):
        assert row["baseline_logprob"] == pytest.approx(without["r_ss_mean"], abs=1e-6)
        assert row["gain"] == pytest.approx(row["r_ss_mean"] - without["r_ss_mean"], abs=1e-6)
        assert without["gain"] == pytest.approx(0, abs=1e-6)
    assert abs(own[0]["gain"]) > 1e-3
    assert own[4]["gain"] == pytest.approx(0, abs=1e-6)


def _student_tokens(config: ScoreConfig, rows: list[dict[str, Any]]) -> list[float]:
    """What the student read in each part beside the explanations."""
    lengths = [row["student_tokens"] for row in rows]
    read = [part["tokens/student"] for part in read_metrics(config.output_dir)]
    return [read[0] - sum(lengths[:3]), read[1] - sum(lengths[3:])]


def _expected_tokens(inputs: ScoreInputs, config: ScoreConfig) -> list[float]:
    """Three rows a part: the second question is asked once for both of its explanations."""
    pairs = pair_builder(inputs.teacher, inputs.student, config.prompts)
    lengths = [len(pairs.pair_from_ids(Problem("", q, s), []).student) for q, s, _ in TEXTS]
    return [lengths[0] + lengths[1], lengths[3] + lengths[4]]


def _read(config: ScoreConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(config.output).to_pylist()
    return rows


def _content(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[name] for name in OF_THE_CONTENT] for row in rows]
