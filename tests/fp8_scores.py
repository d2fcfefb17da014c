"""A small model that FP8 rounds visibly but not wildly, and its scores: one process, any device, any FP8 section."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.types import SpannedSequence
from tests.models.dense import random_sequences
from tests.tiny_models import tiny_hf_model

VOCAB_SIZE = 131
LENGTHS = (23, 9, 40, 31)
SECTIONS: Mapping[str, Fp8Config | None] = {
    "bf16": None,
    "blockwise": Fp8Config(),
    "tensorwise": Fp8Config(recipe="tensorwise"),
    "storage": Fp8Config(activations=False),
    "fc2 and ends bf16": Fp8Config(bf16_linears=("fc2",), bf16_layers_at_ends=1),
}


def small_model(folder: Path, *, num_layers: int = 2, family: str = "qwen2", vocab_size: int = VOCAB_SIZE) -> Path:
    """Sizes that are multiples of 128 also at tp 2; bfloat16 weights."""
    return tiny_hf_model(
        folder,
        family,
        tied=False,
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=256,
        ffn_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        weight_scale=0.05,
    )


def small_student(folder: Path, *, teacher: Path) -> Path:
    """A small model of the family, the tokenizer and the vocabulary of another."""
    config = json.loads((teacher / "config.json").read_text())
    small_model(folder, family=config["model_type"], vocab_size=config["vocab_size"])
    for file in teacher.iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


def sequences() -> list[SpannedSequence]:
    return random_sequences(VOCAB_SIZE, seed=1, lengths=LENGTHS)


def score(
    folder: Path, fp8: Fp8Config | None, wanted: Sequence[SpannedSequence], *, layout: LayoutConfig | None = None
) -> tuple[Tensor, ...]:
    """Log-probs of the wanted tokens on this process's ranks, in packs of at most 512 tokens."""
    from megatron_rlt.jobs.run.load_models import load_frozen_model
    from megatron_rlt.parallel.layout import build_layout
    from megatron_rlt.scoring.engine import LogprobEngine

    layout = layout or LayoutConfig()
    model = load_frozen_model(ModelConfig(model=folder, fp8=fp8, layout=layout), build_layout(layout))
    scoring = ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=64)
    return LogprobEngine(model, temperature=0.7, scoring=scoring).logprobs(wanted).values


def emulated_scores(folder: Path, file: Path) -> dict[str, Tensor]:
    """Scores of `sequences()` by every section of `SECTIONS` on the CPU, in a process that sees no GPU."""
    of_this_job = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_this_job}
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", "tests.fp8_scores", folder, file], check=True, env=environment)
    found: dict[str, Tensor] = torch.load(file)
    return found


def _main(folder: Path, file: Path) -> None:
    from megatron_rlt.parallel.environment import Place, torch_environment
    from megatron_rlt.parallel.platform import start_distributed, stop_distributed

    with torch_environment(Place(0, 1, 0, "this test")):
        start_distributed(timeout_seconds=120)
        torch.save({name: torch.cat(score(folder, fp8, sequences())) for name, fp8 in SECTIONS.items()}, file)
        stop_distributed()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
