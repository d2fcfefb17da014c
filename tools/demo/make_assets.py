"""Write the demo's inputs: a random tiny model with its tokenizer, training rows and held-out rows.

    python -m tools.demo.make_assets OUT --seed 0 --rows 4000

`OUT/model` is an ordinary Hugging Face folder (Llama architecture, 0.1 M parameters), `OUT/train.jsonl` has id,
question, solution and reasoning_trace, `OUT/held_out.jsonl` other questions without a trace. The same arguments
give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo.chain_arithmetic import draw_questions, noisy_trace, solve
from tools.demo.tokenizer import save_tokenizer

NUM_HELD_OUT = 300
NUM_HEADS = 4  # of 16; vLLM's CPU build knows no heads narrower than 32, so there they are two
NUM_VLLM_HEADS = 2
MAX_POSITIONS = 128  # the longest training sequence has 40 tokens; the rest is room for sampling


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's inputs lie."""

    model: Path
    train: Path
    held_out: Path


def make_assets(out: Path, *, seed: int, num_rows: int, num_heads: int = NUM_HEADS) -> DemoAssets:
    """Write everything into `out` (made if missing) and return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    assets = DemoAssets(out / "model", out / "train.jsonl", out / "held_out.jsonl")
    save_model(assets.model, seed=seed, num_heads=num_heads)
    rng = random.Random(seed)
    questions = draw_questions(rng, num_rows + NUM_HELD_OUT)
    train, held_out = questions[:num_rows], questions[num_rows:]
    _write_rows(assets.train, (_row("train", index, q, noisy_trace(rng, q)) for index, q in enumerate(train)))
    _write_rows(assets.held_out, (_row("held-out", index, q, None) for index, q in enumerate(held_out)))
    return assets


def save_model(folder: Path, *, seed: int, num_heads: int = NUM_HEADS) -> None:
    """Write a randomly initialised model and its tokenizer as one Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.dtype = torch.float32
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


def _row(split: str, index: int, question: str, trace: str | None) -> dict[str, str]:
    row = {"id": f"{split}-{index:05d}", "question": question, "solution": solve(question)}
    return row if trace is None else {**row, "reasoning_trace": trace}


def _write_rows(file: Path, rows: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Parse arguments, write the assets, say where they are."""
    parser = argparse.ArgumentParser(description="Write the demo's model, tokenizer and rows.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of questions, explanations and weights")
    parser.add_argument("--rows", type=int, default=4000, help="training rows")
    arguments = parser.parse_args()
    assets = make_assets(arguments.out, seed=arguments.seed, num_rows=arguments.rows)
    print(f"model {assets.model}, training rows {assets.train}, held-out rows {assets.held_out}")


if __name__ == "__main__":
    main()
