"""Inputs of `collect` small enough for tests: two real models, a tokenizer, questions; and a run on a test's ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch.distributed as dist

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.jobs.collect.run import run_collect
from megatron_rlt.launch.watchdog import Heartbeat
from tests.jobs.tiny_scores import PhaseLog, score_inputs, write_rows

NUM_QUESTIONS, NUM_EXPLANATIONS, QUESTIONS_PER_PART = 7, 3, 2
NUM_PARTS = 4
# Random models end an explanation at a letter, so that about half of them are well-formed.
TAGS = {
    "thought_open": "<a>",
    "thought_close": "</a>",
    "solution_open": "<s>",
    "explanation_open": "<x>",
    "explanation_close": "w",
    "separator": " ",
    "padding": " ",
}


@dataclass(frozen=True)
class CollectInputs:
    """Where teacher, student and questions lie."""

    teacher: Path
    student: Path
    rows: Path

    def config(self, folder: Path, **changes: Any) -> CollectConfig:
        """Settings that write into `folder/run`; a part has two questions, the last part one."""
        settings = {
            "output_dir": folder / "run",
            "data": self.rows,
            "teacher": {"model": self.teacher, "dtype": "float32"},
            "student": {"model": self.student, "dtype": "float32"},
            "num_explanations": NUM_EXPLANATIONS,
            "questions_per_part": QUESTIONS_PER_PART,
            "prompts": {"custom_tags": TAGS, "teacher_system": "", "student_system": "", "max_prompt_tokens": 200},
            "rollout": {"max_completion_tokens": 24},
            "scoring": {"max_tokens_per_pack": 300, "row_block": 16, "vocab_block": 64},
            "metrics": {"tensorboard": False},
            "seed": 5,
        }
        return CollectConfig.model_validate(settings | changes)


def collect_inputs(folder: Path) -> CollectInputs:
    """The models of the tests of `score`, and questions of different lengths."""
    models = score_inputs(folder)
    rows = [
        {
            "id": f"q{number}",
            "question": "What is three and four? " * (1 + number % 3),
            "solution": f"the answer is {number}",
        }
        for number in range(NUM_QUESTIONS)
    ]
    return CollectInputs(models.teacher, models.student, write_rows(folder / "questions.jsonl", rows))


def collect_on_ranks(config: CollectConfig) -> tuple[int, list[str]]:
    """`collect` on the ranks of a test; returns exit status and phases."""
    log = PhaseLog()
    heartbeat = Heartbeat(rank=dist.get_rank(), folder=config.output_dir, timeout_seconds=600, on_phase=log.note)
    return run_collect(config, heartbeat), log.phases


def rows_of(config: CollectConfig, scoring: str = "scored") -> list[dict[str, Any]]:
    """The collected rows."""
    rows: list[dict[str, Any]] = pq.read_table(config.output_dir / scoring / "explanations.parquet").to_pylist()
    return rows
