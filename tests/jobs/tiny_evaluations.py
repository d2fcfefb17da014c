"""Inputs of `evaluate` small enough for tests: a real model with a real tokenizer, and questions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.jobs.evaluate.run import run_evaluate
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.prompts.tokenizer import load_tokenizer
from tests.jobs.tiny_scores import PhaseLog, write_rows
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

VOCAB_SIZE = 401  # more than the tokenizer has, and odd: tensor parallelism pads it
MAX_COMPLETION_TOKENS = 12
QUESTIONS = (
    "What is three and four?",
    "Which number follows the number 13?",
    "Is seven a number?",
    "What is 7 * 2?",
    "Who explains the solution to a student?",
    "Let us check 3 + 4 = 7.",
    "Therefore?",
)


@dataclass(frozen=True)
class EvaluationInputs:
    """Where model and rows lie."""

    model: Path
    rows: Path

    def config(self, folder: Path, **changes: Any) -> EvaluateConfig:
        """Settings that write into `folder`: two answers each, small batches, two questions a part."""
        settings = {
            "output_dir": folder / "run",
            "model": {"model": self.model, "dtype": "float32"},
            "data": str(self.rows),
            "kind": "exact",
            "prompts": {"student_system": "", "max_prompt_tokens": 120},
            "metrics": {"tensorboard": False},
            "questions_per_part": 2,
        }
        sampling = {"num_samples": 2, "temperature": 1.0, "max_batch_size": 3} | changes.pop("sampling", {})
        sampling["max_completion_tokens"] = MAX_COMPLETION_TOKENS
        return EvaluateConfig.model_validate(settings | {"sampling": sampling} | changes)

    def in_layout(self, **layout: Any) -> dict[str, Any]:
        """The model section in another layout."""
        return {"model": self.model, "dtype": "float32", "layout": layout}


def evaluation_inputs(folder: Path) -> EvaluationInputs:
    """A random model that ends some of its turns early, and questions with references that it hardly meets."""
    tokenizer = tiny_tokenizer(folder / "tokenizer", "qwen")
    common = {"hidden_size": 32, "ffn_size": 64, "head_dim": 8, "num_kv_heads": 4, "num_layers": 2}
    model = tiny_hf_model(folder / "model", "llama", tied=False, vocab_size=VOCAB_SIZE, **common)
    shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    _end_turns(model)
    rows = [{"id": f"q{i}", "question": text, "answer": "seven"} for i, text in enumerate(QUESTIONS)]
    return EvaluationInputs(model, write_rows(folder / "rows.jsonl", rows))


def _end_turns(model: Path) -> None:
    """Make the end of turn a likely token now and then."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][load_tokenizer(model).end_of_turn_id] *= 3
    save_file(tensors, file, metadata={"format": "pt"})


def evaluate_on_ranks(config: EvaluateConfig, log: PhaseLog) -> int:
    """`evaluate` on the ranks of a test; returns the exit status."""
    heartbeat = Heartbeat(rank=dist.get_rank(), folder=config.output_dir, timeout_seconds=600, on_phase=log.note)
    return run_evaluate(config, heartbeat)
