"""`collect` on ranks: every explanation once, with the oracle's rewards, in any layout; nothing is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.data.prepare import prepare_shards
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.rewards.control import other_questions
from megatron_rlt.types import Completion, FinishReason, Problem, ScoringPair
from tests.jobs.tiny_collect import (
    NUM_EXPLANATIONS,
    NUM_PARTS,
    NUM_QUESTIONS,
    CollectInputs,
    collect_on_ranks,
    rows_of,
)
from tests.oracle import dense_distributions, dense_reward
from tests.ranks import run_ranks

TP2, DP2 = {"tp": 2, "sp": True}, {"tp": 1}
PER_TOKEN = (
    "rollout_logprobs",
    "student_explanation_logprobs",
    "student_solution_logprobs",
    "teacher_explanation_logprobs",
    "kl_per_token",
)
PARTS = ("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty")


def _copy(config: CollectConfig, folder: Path, **changes: Any) -> CollectConfig:
    """The same collection in another place, with settings of its own."""
    shutil.copytree(config.output_dir, folder / "run")
    return CollectConfig.model_validate(config.model_dump() | {"output_dir": folder / "run"} | changes)


def test_every_explanation_is_there_once_in_order_with_its_origin(
    inputs: CollectInputs, collected: CollectConfig
) -> None:
    rows = rows_of(collected)
    places = [(question, member) for question in range(NUM_QUESTIONS) for member in range(NUM_EXPLANATIONS)]
    assert [(row["row"] - 1, row["explanation_index"]) for row in rows] == places
    assert [row["id"] for row in rows] == [f"q{question}" for question, _ in places]
    assert len({row["seed"] for row in rows}) == len(rows)
    origins = {(row["teacher"], row["student"], row["control"], row["run_seed"], row["temperature"]) for row in rows}
    assert origins == {(str(inputs.teacher), str(inputs.student), "none", 5, 0.7)}
    ((teacher, student),) = {(row["teacher_fingerprint"], row["student_fingerprint"]) for row in rows}
    assert teacher != student
    assert len(teacher) == len(student) == 16
    reasons = {(row["finish_reason"], "missing_end_tag" in row["flags"]) for row in rows}
    assert {("stop", False), ("length", True)} <= reasons
    assert ("length", False) not in reasons
    assert len(read_metrics(collected.output_dir / "samples")) == NUM_PARTS
    assert [record["step"] for record in read_metrics(collected.output_dir / "scored")] == [1, 2, 3, 4]
    assert not (collected.output_dir / "scored" / "parts").exists()


def test_texts_lengths_and_rewards_are_those_of_the_oracle(inputs: CollectInputs, collected: CollectConfig) -> None:
    pairs = pair_builder(inputs.teacher, inputs.student, collected.prompts)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(model).eval() for model in (inputs.teacher, inputs.student)
    )
    compared = 0
    for row in rows_of(collected):
        pair = _pair(pairs, row)
        assert row["explanation"] == pairs.teacher.tokenizer.decode(pair.explanation_ids.tolist())
        assert row["student_tokens"] == len(pair.student)
        assert row["flags"] == sorted(pair.flags)
        if pair.num_explanation_tokens == 0:
            assert (row["reward"], row["dropped"]) == (None, "empty explanation")
            continue
        penalty = -1.0 if "missing_end_tag" in row["flags"] else 0.0
        settings = {"alpha": 0.01, "lambda_kl": 3.0, "kl_estimator": "k1", "penalty": penalty}
        expected = dense_reward(teacher, student, pair, temperature=0.7, **settings)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert row["rollout_logprobs"] == pytest.approx(_sampled_logprobs(teacher, pair, pairs), abs=1e-4)
        compared += 1
    assert compared > NUM_QUESTIONS


def _sampled_logprobs(teacher: Any, pair: ScoringPair, pairs: PairBuilder) -> list[float]:
    """Of every sampled token, among the ids that are tokens: the models' vocabularies are padded."""
    wanted = dense_distributions(teacher, pair.teacher, 0.7)[:, : pairs.teacher.tokenizer.num_ids].log_softmax(-1)
    return wanted.gather(1, pair.completion_ids[:, None])[:, 0].tolist()


def _pair(pairs: PairBuilder, row: dict[str, Any]) -> ScoringPair:
    ids = torch.tensor(row["completion_ids"])
    completion = Completion(ids, torch.zeros(len(ids)), 0.7, FinishReason(row["finish_reason"]), row["seed"], 0)
    return pairs.pair(pairs.teacher.prompt(Problem(row["id"], row["question"], row["solution"])), completion)


@pytest.mark.parametrize(("teacher", "student"), [(TP2, DP2), (DP2, TP2)], ids=["tp2+sp, dp2", "dp2, tp2+sp"])
def test_the_rows_are_the_same_in_other_layouts(
    inputs: CollectInputs, collected: CollectConfig, tmp_path: Path, teacher: dict[str, Any], student: dict[str, Any]
) -> None:
    config = inputs.config(
        tmp_path,
        world_size=2,
        teacher={"model": inputs.teacher, "dtype": "float32", "layout": teacher},
        student={"model": inputs.student, "dtype": "float32", "layout": student},
    )
    assert [status for status, _ in run_ranks(collect_on_ranks, 2, config)] == [0, 0]

    for found, expected in zip(rows_of(config), rows_of(collected), strict=True):
        for name, value in expected.items():
            if name in PER_TOKEN or name in PARTS:
                value = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)
            assert found[name] == value, (expected["id"], name)


def _several(configs: list[CollectConfig]) -> list[list[str]]:
    """The phases of several runs, one after another."""
    phases = []
    for config in configs:
        status, seen = collect_on_ranks(config)
        assert status == 0
        phases.append(seen)
    return phases


def test_another_selection_samples_and_scores_nothing_anew(collected: CollectConfig, tmp_path: Path) -> None:
    first = _copy(collected, tmp_path)
    rows = rows_of(first)
    limit = sorted(row["student_tokens"] for row in rows)[len(rows) // 3]
    selections = [{"rule": "best_of_n"}, {"rule": "best_of_n", "max_student_tokens": limit}, {"rule": "all"}]
    configs = [first, *(first.model_copy(update={"selection": _selection(s)}) for s in selections)]
    before = (first.output_dir / "scored" / "explanations.parquet").stat()

    (phases,) = run_ranks(_several, 1, configs)

    assert [set(seen) for seen in phases] == [{"validate", "select"}] * 4
    after = (first.output_dir / "scored" / "explanations.parquet").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    folder = first.output_dir / "scored"
    assert _training_rows(folder / "sft_first.jsonl") == _by_hand(rows, lambda row: 0.0)
    assert _training_rows(folder / "sft_best_of_n.jsonl") == _by_hand(rows, _reward)
    fits = _training_rows(folder / f"sft_best_of_n_{limit}.jsonl")
    assert fits == _by_hand(rows, lambda row: _reward(row) + (1e6 if row["student_tokens"] <= limit else 0.0))
    assert fits != _training_rows(folder / "sft_best_of_n.jsonl") != _training_rows(folder / "sft_first.jsonl")
    everything = _training_rows(folder / "sft_all.jsonl")
    assert NUM_QUESTIONS < len(everything) < len(rows)
    assert len({row["id"] for row in everything}) == len(everything)
    for file in ("sft_best_of_n.jsonl", "sft_all.jsonl"):
        report = prepare_shards(PrepareConfig(input=(str(folder / file),), output_dir=tmp_path / file))
        assert (report.manifest.num_rows, report.manifest.num_rejected) == (len(_training_rows(folder / file)), 0)


def _selection(settings: dict[str, Any]) -> Any:
    return type(CollectConfig.model_fields["selection"].default).model_validate(settings)


def _reward(row: dict[str, Any]) -> float:
    return -1e3 if row["reward"] is None else row["reward"]


def _by_hand(rows: list[dict[str, Any]], worth: Any) -> list[dict[str, str]]:
    """One row a question: not blank, well-formed if there is one, then the most worth, then the earliest."""
    chosen = []
    for number in range(NUM_QUESTIONS):
        group = [row for row in rows if row["id"] == f"q{number}" and row["explanation"].strip()]
        best = min(group, key=lambda row: (bool(row["flags"]), -worth(row), row["explanation_index"]))
        columns = {"id": "id", "question": "question", "solution": "solution", "reasoning_trace": "explanation"}
        chosen.append({name: best[column] for name, column in columns.items()})
    return chosen


def _training_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_controls_are_scored_on_the_same_samples(collected: CollectConfig, tmp_path: Path) -> None:
    names = ("shuffled", "no_explanation", "other_question")
    base = _copy(collected, tmp_path)
    configs = [base.model_copy(update={"control": name}) for name in names]

    (phases,) = run_ranks(_several, 1, configs)

    assert all("rollout" not in seen and seen.count("student") == NUM_PARTS for seen in phases)
    real = rows_of(base)
    own = [row["completion_ids"][: row["explanation_tokens"]] for row in real]
    shuffled, nothing, others = (rows_of(base, f"control_{name}") for name in names)
    assert [sorted(row["control_ids"]) for row in shuffled] == [sorted(ids) for ids in own]
    assert [row["control_ids"] for row in shuffled] != own
    assert {tuple(row["control_ids"]) for row in nothing} == {()}
    assert {(row["reward"], row["dropped"]) for row in nothing} == {(None, "empty explanation")}
    # Without an explanation all scores of a question are one: that of its solution after the bare question. Pack-mates
    # change the order in which a processor adds, and so the last bits.
    scores: dict[str, list[float]] = {}
    for row in nothing:
        scores.setdefault(row["id"], []).append(row["r_ss"])
    assert len(scores) == NUM_QUESTIONS
    assert all(max(same) - min(same) < 1e-5 for same in scores.values())
    assert len({round(same[0], 4) for same in scores.values()}) == NUM_QUESTIONS
    questions = [row["question"] for row in real[::NUM_EXPLANATIONS]]
    places = other_questions(questions, seed=base.seed)
    assert all(questions[place] != question for place, question in zip(places, questions, strict=True))
    theirs = [own[place * NUM_EXPLANATIONS + member] for place in places for member in range(NUM_EXPLANATIONS)]
    assert [row["control_ids"] for row in others] == theirs
    for row, expected in zip(others, real, strict=True):
        for name in ("id", "explanation", "flags", "completion_ids", "student_tokens", "penalty"):
            assert row[name] == expected[name] or (name == "penalty" and row[name] is None), name
    assert sum(row["r_ss"] != expected["r_ss"] for row, expected in zip(others, real, strict=True)) > len(real) / 2


def test_an_unscored_collection_can_be_scored_later(
    inputs: CollectInputs, collected: CollectConfig, tmp_path: Path
) -> None:
    unscored = inputs.config(tmp_path, student=None, selection={"rule": "first", "max_student_tokens": 40})
    later = inputs.config(tmp_path)

    (phases,) = run_ranks(_several, 1, [unscored, later])

    assert phases[0].count("rollout") == NUM_PARTS
    assert "student" not in phases[0]
    assert "rollout" not in phases[1]
    assert rows_of(later) == rows_of(collected)
    rows = rows_of(unscored, "unscored")
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in rows_of(collected)]
    assert {(row["reward"], row["dropped"], row["student"]) for row in rows} == {(None, None, None)}
    assert len(_training_rows(unscored.output_dir / "unscored" / "sft_first_40.jsonl")) == NUM_QUESTIONS


def test_what_is_too_long_for_the_student_is_kept_without_a_reward(
    inputs: CollectInputs, collected: CollectConfig, tmp_path: Path
) -> None:
    limit = sorted(row["student_tokens"] for row in rows_of(collected))[10]
    student = tmp_path / "student"
    shutil.copytree(inputs.student, student)
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": limit}))
    selection = {"rule": "best_of_n", "max_student_tokens": limit}
    config = inputs.config(tmp_path, student={"model": student, "dtype": "float32"}, selection=selection)

    assert [status for status, _ in run_ranks(collect_on_ranks, 1, config)] == [0]

    for found, expected in zip(rows_of(config), rows_of(collected), strict=True):
        assert found["completion_ids"] == expected["completion_ids"]
        assert found["student_tokens"] == expected["student_tokens"]
        if found["student_tokens"] > limit:
            assert (found["reward"], found["dropped"]) == (None, f"longer than the student's {limit} positions")
        else:
            assert (found["reward"], found["dropped"]) == (pytest.approx(expected["reward"]), expected["dropped"])
    rows = _training_rows(config.output_dir / "scored" / f"sft_best_of_n_{limit}.jsonl")
    assert rows == _by_hand(
        rows_of(config), lambda row: _reward(row) + (1e6 if row["student_tokens"] <= limit else 0.0)
    )


def test_shares_joined_in_order_are_the_whole_collection(
    inputs: CollectInputs, collected: CollectConfig, tmp_path: Path
) -> None:
    """Seven questions in three shares: two, two and three."""
    shares = [inputs.config(tmp_path / str(index), share={"index": index, "count": 3}) for index in range(3)]
    for share in shares:
        assert run_ranks(collect_on_ranks, 2, share)[0][0] == 0
    assert [len({row["id"] for row in rows_of(share)}) for share in shares] == [2, 2, 3]
    joined = b"".join((share.output_dir / "scored" / "sft_first.jsonl").read_bytes() for share in shares)
    assert joined == (collected.output_dir / "scored" / "sft_first.jsonl").read_bytes()
