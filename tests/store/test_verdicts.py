"""What a file of verdicts comes to, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_rlt.store.parts import PartStore
from megatron_rlt.store.verdicts import SCHEMA, VerdictRow, summarize_verdicts
from megatron_rlt.types import FinishReason


def _row(
    question: str, sample: int, answer: str | None, *, reference: str, tokens: int, cut: bool = False
) -> VerdictRow:
    right = answer == reference
    return VerdictRow(
        id=question,
        sample=sample,
        question=f"{question}?",
        completion=f"so {answer}",
        answer=answer,
        reference=reference,
        correct=right,
        reason="correct" if right else "no answer" if answer is None else "wrong",
        tokens=tokens,
        finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP,
        seed=sample + 2**62,
    )


ROWS = (
    _row("a", 0, "3", reference="3", tokens=4),
    _row("a", 1, "3", reference="3", tokens=6),
    _row("a", 2, "5", reference="3", tokens=8),
    _row("b", 0, "1", reference="2", tokens=9, cut=True),
    _row("b", 1, None, reference="2", tokens=9, cut=True),
    _row("b", 2, "2", reference="2", tokens=6),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    store = PartStore(tmp_path / "parts", SCHEMA, {"seed": 0}, output=tmp_path / "verdicts.parquet", key="output_dir")
    store.begin()
    store.write(0, [row.cells() for row in ROWS[:3]])
    store.write(1, [row.cells() for row in ROWS[3:]])
    store.join(2, {})
    return tmp_path / "verdicts.parquet"


def test_rows_read_back_as_they_were_written(file: Path) -> None:
    rows = pq.read_table(file).to_pylist()
    assert [VerdictRow(**row | {"finish_reason": FinishReason(row["finish_reason"])}) for row in rows] == list(ROWS)


def test_the_summary_is_that_of_hand_arithmetic(file: Path) -> None:
    summary = summarize_verdicts(file, num_samples=3)
    assert (summary.num_questions, summary.num_answers) == (2, 6)
    assert summary.reasons == {"correct": 3, "wrong": 2, "no answer": 1}
    # a: 2 of 3 right; b: 1 of 3. Half their difference is the standard error of two.
    average = summary.estimates["avg@3"]
    assert (average.mean, average.standard_error) == (pytest.approx(1 / 2), pytest.approx(1 / 6))
    # a: "3" leads 2 to 1. b: "1" and "2" have a vote each, no answer does not vote: 1/2.
    assert summary.estimates["maj@3"].mean == pytest.approx(3 / 4)
    assert summary.estimates["pass@3"].mean == 1.0
    assert summary.mean_tokens == pytest.approx(42 / 6)
    assert summary.truncated_share == pytest.approx(2 / 6)


def test_one_answer_a_question_counts_each_row_by_itself(file: Path) -> None:
    summary = summarize_verdicts(file, num_samples=1)
    assert {name: estimate.mean for name, estimate in summary.estimates.items()} == pytest.approx(
        {"avg@1": 1 / 2, "maj@1": 1 / 2, "pass@1": 1 / 2}
    )
    assert summary.estimates["avg@1"].standard_error == pytest.approx(math.sqrt(0.3 / 6))  # variance 6/5 x 1/4
