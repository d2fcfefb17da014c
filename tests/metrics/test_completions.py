"""The completion store gives back what was put in, bit for bit."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_rlt.store.completions import CompletionRow, CompletionStore, read_completions
from megatron_rlt.types import (
    Completion,
    FinishReason,
    FormatFlag,
    LeakMetrics,
    Problem,
    Prompt,
    RewardParts,
    ScoringPair,
    Span,
    SpannedSequence,
)


def _row(
    seed: int, *, num_tokens: int, flags: frozenset[FormatFlag], reward: float, one_tokenizer: bool = True
) -> CompletionRow:
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(f"problem {seed}", "2 + 2 = ?", "4")
    prompt = Prompt(problem, torch.tensor([5, 6, 7]))
    tokens = torch.randint(0, 200_000, (num_tokens,), generator=generator)
    explanation = torch.randn(max(num_tokens - 1, 0), generator=generator)
    completion = Completion(tokens, torch.randn(num_tokens, generator=generator), 0.7, FinishReason.LENGTH, 2**62, 3)
    teacher = SpannedSequence(torch.cat([prompt.token_ids, tokens]), (Span(3, 3 + num_tokens),))
    pair = ScoringPair(problem, teacher, teacher, len(explanation), flags, "sum ∑ of\n2 and 2")
    parts = RewardParts(
        reward, -0.25, -0.2, -5.0, 0.1, 0.05, 5.0, -1.0, explanation, torch.tensor([-0.5]), explanation * 2, explanation
    )
    if not one_tokenizer:
        parts = replace(parts, r_kl=math.nan, r_kl_mean=math.nan, r_kl_max=math.nan, kl_per_token=None)
    return CompletionRow.of(
        prompt,
        completion,
        pair,
        parts,
        LeakMetrics(0.25, 1.0, 0.125, 3.5),
        step=7,
        question_index=1,
        completion_index=2,
        advantage=0.5,
        rewards_by_student={"student": 0.1 + 0.2, "other": -1.0},
        old_logprobs=torch.randn(num_tokens, generator=generator),
    )


_ROWS = [
    _row(0, num_tokens=5, flags=frozenset({FormatFlag.TRUNCATED, FormatFlag.MISSING_END_TAG}), reward=0.1 + 0.2),
    _row(1, num_tokens=0, flags=frozenset({FormatFlag.EMPTY}), reward=math.nan),
    _row(2, num_tokens=300, flags=frozenset(), reward=-1.0),
    _row(3, num_tokens=4, flags=frozenset(), reward=-1.25, one_tokenizer=False),
]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = CompletionStore(tmp_path / "completions").write(7, _ROWS)
    assert path == tmp_path / "completions" / "step-000007.parquet"
    for written, read in zip(_ROWS, read_completions(path), strict=True):
        for field in fields(CompletionRow):
            expected, seen = vars(written)[field.name], vars(read)[field.name]
            if isinstance(expected, torch.Tensor):
                assert expected.dtype == seen.dtype
                assert torch.equal(expected, seen), field.name
            elif expected != expected:
                assert math.isnan(seen)
            else:
                assert expected == seen, field.name
                assert type(expected) is type(seen), field.name


def test_the_file_is_plain_compressed_parquet_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = CompletionStore(tmp_path).write(7, _ROWS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000007.parquet"]
    file = pq.ParquetFile(path)
    assert file.metadata.num_rows == 4
    assert {file.metadata.row_group(0).column(index).compression for index in range(5)} == {"ZSTD"}
    assert pq.read_table(path, columns=["flags"]).to_pydict()["flags"] == [
        ["missing_end_tag", "truncated"],
        ["empty"],
        [],
        [],
    ]


def test_a_step_done_again_replaces_its_file(tmp_path: Path) -> None:
    store = CompletionStore(tmp_path)
    store.write(7, _ROWS)
    store.write(7, _ROWS[:1])
    assert len(read_completions(store.path(7))) == 1


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(ValueError, match="lacks the columns"):
        read_completions(path)
