"""The verdicts of an evaluation: one row per completion in `verdicts.parquet`, and a summary of such a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.metrics.pass_at_k import Attempts, Estimate, avg_at_k, maj_at_k, pass_at_k
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.store.parts import column_type
from megatron_rlt.types import FinishReason


@dataclass(frozen=True)
class VerdictRow:
    """One completion and what it is worth."""

    id: str  # of the question
    sample: int  # of the question's completions, from 0
    question: str  # as the model was asked, choices and instructions included
    completion: str  # without the end of turn; a pre-filled tag is not part of it
    answer: str | None  # as it was read; None if none was found
    reference: str
    correct: bool
    reason: str
    tokens: int  # of the completion, end of turn included
    finish_reason: FinishReason
    seed: int

    def cells(self) -> dict[str, Any]:
        """Values by column."""
        return asdict(self) | {"finish_reason": self.finish_reason.value}


SCHEMA = pa.schema((field.name, column_type(field)) for field in fields(VerdictRow))


@dataclass(frozen=True)
class VerdictSummary:
    """What a file of verdicts comes to."""

    num_questions: int
    num_answers: int
    estimates: dict[str, Estimate]  # "avg@k", "maj@k", "pass@k" with k the completions of each question
    reasons: dict[str, int]  # answers by reason, the most frequent first
    mean_tokens: float
    truncated_share: float  # of answers that ran out of tokens


def summarize_verdicts(file: Path, *, num_samples: int) -> VerdictSummary:
    """Read a joined file: each question's `num_samples` rows stand together."""
    table = pq.read_table(file, columns=["correct", "answer", "reason", "tokens", "finish_reason"])
    correct, answers = table["correct"].to_pylist(), table["answer"].to_pylist()
    starts = range(0, table.num_rows, num_samples)
    problems = [
        Attempts(tuple(correct[start : start + num_samples]), tuple(answers[start : start + num_samples]))
        for start in starts
    ]
    estimators = {"avg": avg_at_k, "maj": maj_at_k, "pass": pass_at_k}
    truncated = [reason == FinishReason.LENGTH.value for reason in table["finish_reason"].to_pylist()]
    return VerdictSummary(
        num_questions=len(problems),
        num_answers=table.num_rows,
        estimates={f"{name}@{num_samples}": at_k(problems, k=num_samples) for name, at_k in estimators.items()},
        reasons=dict(Counter(table["reason"].to_pylist()).most_common()),
        mean_tokens=Tally.of(table["tokens"].to_pylist()).mean,
        truncated_share=Tally.of(truncated).mean,
    )
