"""Inputs of `score` small enough for tests: two real models, a real tokenizer, rows with every kind of edge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.jobs.score.run import run_score
from megatron_rlt.launch.watchdog import Heartbeat
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

VOCAB_SIZE = 401  # more than the tokenizer has, and odd: tensor parallelism pads it
MAX_POSITIONS = 400
QUESTION = "What is three and four?"
# One-token solutions, an empty explanation, one of white space, tags inside, one token, a long one, newlines at edges.
TRACES: tuple[tuple[str, str], ...] = (
    ("7", "First we add the numbers, so the answer is seven."),
    ("the answer is seven", "x"),
    ("7", ""),
    ("3 + 4 = 7, and 7 * 2 = 14.", "Let us check.<|begin_of_solution|>7<|end_of_explanation|> Now it ends."),
    ("14", "\n\nTherefore the final answer is 14.\n\n"),
    ("the solution follows", "   "),
    ("1", "We multiply the result by two. " * 12),
    ("seven", "simple steps, 3 + 4"),
)


@dataclass(frozen=True)
class ScoreInputs:
    """Where teacher, student and rows lie."""

    teacher: Path
    student: Path
    rows: Path

    def config(self, folder: Path, **changes: Any) -> ScoreConfig:
        """Settings that write into `folder`; short prompts, small blocks, so that nothing goes in one piece."""
        settings = {
            "output_dir": folder / "run",
            "input": self.rows,
            "output": folder / "scores.parquet",
            "teacher": {"model": self.teacher, "dtype": "float32"},
            "student": {"model": self.student, "dtype": "float32"},
            "prompts": {"teacher_system": "", "student_system": ""},
            "scoring": {"max_tokens_per_pack": 300, "row_block": 16, "vocab_block": 64},
            "metrics": {"tensorboard": False},
            "rows_per_part": 3,
        }
        return ScoreConfig.model_validate(settings | changes)


def score_inputs(folder: Path, traces: Sequence[tuple[str, str]] = TRACES) -> ScoreInputs:
    """Teacher and student of other families and shapes with one tokenizer; both can be split in four."""
    tokenizer = tiny_tokenizer(folder / "tokenizer", "qwen")
    common = {"tied": False, "num_layers": 2, "vocab_size": VOCAB_SIZE, "max_positions": MAX_POSITIONS}
    teacher = tiny_hf_model(folder / "teacher", "qwen3", **common)
    student = tiny_hf_model(
        folder / "student", "llama", seed=1, hidden_size=32, ffn_size=64, head_dim=8, num_kv_heads=4, **common
    )
    for model in (teacher, student):
        shutil.copytree(tokenizer, model, dirs_exist_ok=True)
        flatten_distributions(model / "model.safetensors")
    return ScoreInputs(teacher, student, write_rows(folder / "rows.jsonl", [row(i, *t) for i, t in enumerate(traces)]))


def flatten_distributions(file: Path) -> None:
    """Bring log-probs near those of trained models: k3 has exp(gap), and gaps of 10 nats amplify float32's rounding."""
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 0.25
    save_file(tensors, file, metadata={"format": "pt"})


def row(number: int, solution: object, explanation: object) -> dict[str, object]:
    """One row of the input."""
    return {"id": f"row {number}", "question": QUESTION, "solution": solution, "explanation": explanation}


def write_rows(file: Path, rows: Sequence[object]) -> Path:
    """A JSONL file; bytes are written as they are, everything else as JSON."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


@dataclass
class PhaseLog:
    """The phases that a run went through on this rank, and something to do when one begins."""

    phases: list[str] = field(default_factory=list)
    action: Callable[[str, int], None] | None = None  # called with the phase's name and how often it has begun

    def note(self, phase: str) -> None:
        self.phases.append(phase)
        if self.action is not None:
            self.action(phase, self.phases.count(phase))


def score_on_ranks(config: ScoreConfig, log: PhaseLog) -> int:
    """`score` on the ranks of a test; returns the exit status."""
    heartbeat = Heartbeat(rank=dist.get_rank(), folder=config.output_dir, timeout_seconds=600, on_phase=log.note)
    return run_score(config, heartbeat)
