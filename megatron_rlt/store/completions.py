"""The completion store: every completion of a step with all that its reward was made of, one Parquet file a step.

Coefficients can be changed afterwards without scoring again, and the worst explanation of a run can be read. Rows are
replicated over ranks, so one rank writes. Text is for people; the ids are what was sampled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_rlt.types import Completion, FinishReason, FormatFlag, LeakMetrics, Prompt, RewardParts, ScoringPair


@dataclass(frozen=True, eq=False)
class CompletionRow:
    """One completion. C tokens were sampled, E of them are the explanation, the solution has S.

    A student with another tokenizer than the teacher's has an E and S of its own, and no KL: r_KL's parts are nan.
    """

    step: int
    problem_id: str
    question_index: int  # within the step's batch
    completion_index: int  # within its group
    seed: int
    policy_version: int
    temperature: float  # of all log-probs here
    finish_reason: FinishReason
    flags: tuple[FormatFlag, ...]
    text: str  # the explanation
    reward: float  # nan: dropped from its group
    rewards_by_student: Mapping[str, float]  # each student's own; one entry where there is one student
    advantage: float
    r_ss: float
    r_ss_mean: float
    r_ss_min: float
    r_kl: float
    r_kl_mean: float
    r_kl_max: float
    penalty: float
    solution_overlap: float  # these four: LeakMetrics
    states_the_answer: float
    repetition: float
    epistemic_per_100_words: float
    num_explanation_tokens: int  # E
    teacher_prompt_ids: Tensor  # [P] int64
    completion_ids: Tensor  # [C] int64
    rollout_logprobs: Tensor  # [C] float32, of the sampling engine
    old_logprobs: Tensor  # [C] float32, of the policy before the update
    student_explanation_logprobs: Tensor  # [E] float32
    student_solution_logprobs: Tensor  # [S] float32
    kl_per_token: Tensor | None  # [E] float32; None: teacher and student have different tokenizers

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        completion: Completion,
        pair: ScoringPair,
        parts: RewardParts,
        leaks: LeakMetrics,
        *,
        step: int,
        question_index: int,
        completion_index: int,
        advantage: float,
        rewards_by_student: Mapping[str, float],
        old_logprobs: Tensor,
    ) -> CompletionRow:
        """Bring together what the stages of a step found out about one completion."""
        return cls(
            step=step,
            problem_id=prompt.problem.problem_id,
            question_index=question_index,
            completion_index=completion_index,
            seed=completion.seed,
            policy_version=completion.policy_version,
            temperature=completion.temperature,
            finish_reason=completion.finish_reason,
            flags=tuple(sorted(pair.flags)),
            text=pair.explanation_text,
            reward=parts.reward,
            rewards_by_student=rewards_by_student,
            advantage=advantage,
            r_ss=parts.r_ss,
            r_ss_mean=parts.r_ss_mean,
            r_ss_min=parts.r_ss_min,
            r_kl=parts.r_kl,
            r_kl_mean=parts.r_kl_mean,
            r_kl_max=parts.r_kl_max,
            penalty=parts.penalty,
            solution_overlap=leaks.solution_overlap,
            states_the_answer=leaks.states_the_answer,
            repetition=leaks.repetition,
            epistemic_per_100_words=leaks.epistemic_per_100_words,
            num_explanation_tokens=pair.num_explanation_tokens,
            teacher_prompt_ids=prompt.token_ids,
            completion_ids=completion.token_ids,
            rollout_logprobs=completion.rollout_logprobs,
            old_logprobs=old_logprobs,
            student_explanation_logprobs=parts.student_explanation_logprobs,
            student_solution_logprobs=parts.student_solution_logprobs,
            kl_per_token=parts.kl_per_token,
        )


# Column types by the fields' annotations; a column's name is its field's.
_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "FinishReason": pa.string(),
    "tuple[FormatFlag, ...]": pa.list_(pa.string()),
    "Tensor": pa.list_(pa.float32()),
    "Mapping[str, float]": pa.map_(pa.string(), pa.float64()),
    "Tensor | None": pa.list_(pa.float32()),
}


_ID_COLUMNS = ("teacher_prompt_ids", "completion_ids")


_SCHEMA = pa.schema(
    (field.name, pa.list_(pa.int64()) if field.name in _ID_COLUMNS else _TYPES[str(field.type)])
    for field in fields(CompletionRow)
)


class CompletionStore:
    """The folder of a run's completions."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.parquet"

    def write(self, step: int, rows: Sequence[CompletionRow]) -> Path:
        """Write a step's file, whole or not at all; a step that is done again replaces its file."""
        assert all(row.step == step for row in rows), "all rows of a file belong to its step"
        self._folder.mkdir(parents=True, exist_ok=True)
        columns = [pa.array([_cell(vars(row)[column.name]) for row in rows], type=column.type) for column in _SCHEMA]
        temporary = self._folder / f".step-{step:06d}.parquet.tmp"
        with temporary.open("wb") as file:
            pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(self.path(step))


def read_completions(path: Path) -> list[CompletionRow]:
    """The rows of one step's file, as they were written.

    Raises:
        ValueError: the file lacks a column of the store.
    """
    table = pq.read_table(path)
    if missing := [name for name in _SCHEMA.names if name not in table.column_names]:
        raise ValueError(f"{path} lacks the columns {missing}: it was not written by the completion store")
    return [_row(values) for values in table.select(_SCHEMA.names).to_pylist()]


def _cell(value: Any) -> Any:  # noqa: ANN401 - one cell of any column
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        return list(value.items())
    return [flag.value for flag in value] if isinstance(value, tuple) else value


def _row(values: dict[str, Any]) -> CompletionRow:
    for column in _SCHEMA:
        if column.name in _ID_COLUMNS:
            values[column.name] = torch.tensor(values[column.name], dtype=torch.int64)
        elif column.type == _TYPES["Tensor"] and values[column.name] is not None:
            values[column.name] = torch.tensor(values[column.name], dtype=torch.float32)
    values["rewards_by_student"] = dict(values["rewards_by_student"])
    values["finish_reason"] = FinishReason(values["finish_reason"])
    values["flags"] = tuple(FormatFlag(flag) for flag in values["flags"])
    return CompletionRow(**values)
