"""`score` with a placebo in the explanation's place gives the scores of a file that holds the placebo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_rlt.config.jobs import ScoreConfig
from megatron_rlt.rewards.placebo import other_questions
from tests.jobs.tiny_scores import PhaseLog, score_inputs, score_on_ranks, write_rows
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


def test_placebos_are_scored_in_place_of_the_explanations(tmp_path: Path) -> None:
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
    placebos = ("none", "other_question", "no_explanation", "shuffled")
    configs = [
        *(inputs.config(tmp_path / name, input=files["own"], placebo=name, seed=SEED) for name in placebos),
        *(inputs.config(tmp_path / name, input=files[name]) for name in ("others", "empty")),
    ]

    assert run_ranks(_score, 1, configs) == [[0] * len(configs)]

    own, other, nothing, shuffled, expected_other, expected_nothing = (_read(config) for config in configs)
    assert _content(other) == _content(expected_other) != _content(own)
    assert _content(nothing) == _content(expected_nothing)
    assert [row["explanation_tokens"] for row in shuffled] == [row["explanation_tokens"] for row in own]
    assert all(a["r_ss"] != b["r_ss"] for a, b in zip(shuffled, own, strict=True) if a["explanation_tokens"] > 2)
    assert [row["flags"] for row in other] == [row["flags"] for row in own]


def _read(config: ScoreConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(config.output).to_pylist()
    return rows


def _content(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[name] for name in OF_THE_CONTENT] for row in rows]
