"""Explanations with rewards come back as they were written, bit for bit, and say how their rewards were made."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import (
    CompletionStore,
    explanation_store,
    read_explanations,
    reward_settings,
    summarize_explanations,
)
from megatron_rlt.types import (
    Completion,
    FinishReason,
    FormatFlag,
    LeakMetrics,
    Problem,
    Prompt,
    Reward,
    RewardEvidence,
    ScoredExplanation,
    ScoringPair,
    Span,
    SpannedSequence,
    StudentScores,
)

NAN, INF = math.nan, math.inf
TERMS = ("r_ss", "r_kl", "penalty")
SETTINGS = RewardConfig(alpha=0.5, lambda_kl=2.0)


def _scored(
    seed: int, *, num_tokens: int, flags: frozenset[FormatFlag], reward: float, one_tokenizer: bool = True
) -> ScoredExplanation:
    """What a training step knows of one completion, with values drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(f"problem {seed}", "2 + 2 = ?", "4")
    prompt = Prompt(problem, torch.tensor([5, 6, 7]))
    tokens = torch.randint(0, 200_000, (num_tokens,), generator=generator)
    rollout, old = (torch.randn(num_tokens, generator=generator) for _ in range(2))
    explanation = torch.randn(max(num_tokens - 1, 0), generator=generator)
    completion = Completion(tokens, rollout, 0.7, FinishReason.LENGTH, 2**62, 3)
    teacher = SpannedSequence(torch.cat([prompt.token_ids, tokens]), (Span(3, 3 + num_tokens),))
    end = 1 + len(explanation)
    student = SpannedSequence(torch.arange(end + 3), (Span(1, end), Span(end + 1, end + 2)))
    pair = ScoringPair(problem, teacher, student, len(explanation), flags, "sum ∑ of\n2 and 2", one_tokenizer)
    evidence = RewardEvidence(
        student_explanation_logprobs=explanation,
        student_solution_logprobs=torch.tensor([-0.5]),
        teacher_explanation_logprobs=old[: len(explanation)],
        baseline_solution_logprobs=torch.tensor([-1.5]),
        divergence=None,
        flags=flags,
        leaks=LeakMetrics(0.25, 1.0, 0.125, 3.5),
        one_tokenizer=one_tokenizer,
    )
    combined = Reward(
        total=reward,
        terms={"r_ss": -0.25, "r_kl": 0.1 if one_tokenizer else NAN, "penalty": -INF},
        kl_per_token=explanation * 2 if one_tokenizer else None,
        dropped="empty explanation" if math.isnan(reward) else None,
        evidence=evidence,
    )
    return ScoredExplanation(
        prompt=prompt,
        completion=completion,
        question_index=1,
        completion_index=2,
        sequence=teacher,
        old_logprobs=old,
        old_entropy=old,
        reference_logprobs=None,
        reward=reward,
        advantage=0.5,
        students={"student": StudentScores(pair, explanation, torch.tensor([-0.5]), None)},
        rewards={"student": replace(combined, total=0.1 + 0.2), "other": replace(combined, total=NAN)},
        combined=combined,
    )


STEP = [
    _scored(0, num_tokens=5, flags=frozenset({FormatFlag.TRUNCATED, FormatFlag.MISSING_END_TAG}), reward=0.1 + 0.2),
    _scored(1, num_tokens=0, flags=frozenset({FormatFlag.EMPTY}), reward=NAN),
    _scored(2, num_tokens=300, flags=frozenset(), reward=-1.0),
    _scored(3, num_tokens=4, flags=frozenset(), reward=-1.25, one_tokenizer=False),
]


def _completions(folder: Path) -> CompletionStore:
    return CompletionStore(folder, terms=TERMS, reward=SETTINGS, is_writer=True)


def _assert_same(written: StoredExplanation, read: StoredExplanation) -> None:
    """nan, which a person has to know how to look for, comes back as None."""
    for field in fields(StoredExplanation):
        expected, seen = vars(written)[field.name], vars(read)[field.name]
        if isinstance(expected, Tensor):
            assert expected.dtype == seen.dtype
            assert torch.equal(expected, seen), field.name
        elif isinstance(expected, dict):
            assert {name: None if value != value else value for name, value in expected.items()} == seen, field.name
        elif expected != expected:
            assert seen is None
        else:
            assert expected == seen, field.name
            assert type(expected) is type(seen), field.name


def test_a_steps_completions_come_back_as_they_were_written(tmp_path: Path) -> None:
    _completions(tmp_path / "completions").write_step(7, STEP)
    path = tmp_path / "completions" / "step-000007.parquet"
    for one, read in zip(STEP, read_explanations(path, with_tokens=True), strict=True):
        _assert_same(StoredExplanation.of_step(7, one), read)
        assert (read.id, read.step, read.question_index, read.explanation_index) == (
            one.prompt.problem.problem_id,
            7,
            1,
            2,
        )
        assert (read.prompt_tokens, read.completion_tokens) == (3, len(one.completion.token_ids))
        assert (read.solution_tokens, read.student_tokens) == (1, read.explanation_tokens + 4)
        evidence = read.evidence(exact_kl=False)
        assert evidence is not None
        assert evidence.one_tokenizer == one.pair.one_tokenizer
        assert torch.equal(evidence.teacher_explanation_logprobs, one.old_logprobs[: one.pair.num_explanation_tokens])
    assert reward_settings(path) == SETTINGS


def test_rows_without_their_tokens_have_all_the_rest(tmp_path: Path) -> None:
    _completions(tmp_path).write_step(7, STEP)
    first = next(read_explanations(tmp_path / "step-000007.parquet", with_tokens=False))
    assert (first.explanation, first.reward, first.completion_ids, first.kl_per_token) == (
        "sum ∑ of\n2 and 2", 0.1 + 0.2, None, None,
    )  # fmt: skip
    assert first.leaks == LeakMetrics(0.25, 1.0, 0.125, 3.5)


def test_the_file_is_plain_compressed_parquet_and_nothing_else_is_left(tmp_path: Path) -> None:
    _completions(tmp_path).write_step(7, STEP)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000007.parquet"]
    file = pq.ParquetFile(tmp_path / "step-000007.parquet")
    assert file.metadata.num_rows == 4
    assert {file.metadata.row_group(0).column(index).compression for index in range(5)} == {"ZSTD"}
    table = pq.read_table(tmp_path / "step-000007.parquet").to_pydict()
    assert table["flags"] == [["missing_end_tag", "truncated"], ["empty"], [], []]
    assert table["reward"] == [0.1 + 0.2, None, -1.0, -1.25]
    assert table["r_kl"] == [0.1, 0.1, 0.1, None]
    assert table["penalty"] == [-INF] * 4
    assert table["gain"] == [None] * 4


def test_a_step_done_again_replaces_its_file_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    _completions(tmp_path).write_step(7, STEP)
    _completions(tmp_path).write_step(7, STEP[:1])
    CompletionStore(tmp_path, terms=TERMS, reward=SETTINGS, is_writer=False).write_step(8, STEP)
    (file,) = tmp_path.iterdir()
    assert len(list(read_explanations(file, with_tokens=True))) == 1


def test_parts_become_one_file_in_order_whose_numbers_are_counted(tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    store = explanation_store(tmp_path / "parts", {}, terms=TERMS, reward=SETTINGS, output=output, key="output")
    rows = [StoredExplanation.of_step(1, one) for one in STEP]
    unscored = StoredExplanation.of_pair(STEP[2].pair, question_index=4, explanation_index=0, temperature=0.7)
    store.begin()
    store.write(0, [row.cells() for row in (rows[2], rows[1])])
    gained = replace(rows[3], gain=1.0, baseline_logprob=-1.5)
    store.write(1, [row.cells() for row in (gained, replace(unscored, dropped="too long"))])
    store.join(2, {"rank": [1, None, 2, None]})

    found = pq.read_table(output).to_pylist()
    assert [row["id"] for row in found] == ["problem 2", "problem 1", "problem 3", "problem 2"]
    assert [row["rank"] for row in found] == [1, None, 2, None]
    assert [row["dropped"] for row in found] == [None, "empty explanation", None, "too long"]
    assert (found[3]["r_ss"], found[3]["repetition"], found[3]["kl_per_token"]) == (None, None, None)
    read = list(read_explanations(output, with_tokens=True))
    assert read[3].evidence(exact_kl=False) is None
    _assert_same(rows[2], next(read_explanations(store.part(0), with_tokens=True)))
    summary = summarize_explanations(output, ("reward", "r_ss", "penalty", "gain", "advantage"))
    assert (summary.num_questions, summary.num_explanations, summary.num_well_formed) == (2, 4, 3)
    assert summary.dropped == {"empty explanation": 1, "too long": 1}
    assert summary.flags == {"empty": 1}
    # penalty: all of them infinite
    assert [summary.means[name] for name in ("reward", "r_ss", "gain", "advantage")] == [-1.125, -0.25, 1.0, 0.5]
    assert math.isnan(summary.means["penalty"])


def test_a_file_of_another_version_or_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    earlier, other, text = (tmp_path / name for name in ("earlier.parquet", "other.parquet", "text"))
    pq.write_table(pa.table({"problem_id": ["a"], "student_solution_logprobs": [[0.5]]}), earlier)
    pq.write_table(pa.table({"step": [1]}), other)
    text.write_text("text")
    for file, said in {
        earlier: "was written by another version of megatron_rlt, with other columns; read it with that version, or",
        other: "was not written by score, collect or train; give a file of theirs",
        text: "is no readable Parquet file",
    }.items():
        with pytest.raises(ValueError, match=f"^{file} {said}"):
            next(read_explanations(file, with_tokens=True))
