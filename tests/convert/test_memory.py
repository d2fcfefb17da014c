"""A conversion holds a tensor and a file, not the model: it passes under a limit that the model does not fit into."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from tests.convert.conversions import converted
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_ALLOWED_BYTES = 96 * 2**20  # beyond what the process has; the weights are 214 MB, the largest tensor 8.4 MB
_OPTIONS = ("--certify", "none", "--max-shard-bytes", "16000000")


def _under_a_limit(root: Path) -> bool:
    in_use = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + _ALLOWED_BYTES, resource.RLIM_INFINITY))
    kinds = ("hf", "bridge", "nemo", "megatron")
    for source, target in zip(kinds, (*kinds[1:], "back"), strict=True):
        converted(root / source, root / target, "--to", "hf" if target == "back" else target, *_OPTIONS)
    try:
        torch.ones(2 * _ALLOWED_BYTES, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def test_a_model_twice_the_limit_goes_through_all_kinds(tmp_path: Path) -> None:
    sizes = {"num_layers": 12, "hidden_size": 512, "ffn_size": 2048, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    hf = tiny_hf_model(tmp_path / "hf", "llama", tied=True, **sizes, max_shard_size="16MB")
    assert sum(file.stat().st_size for file in hf.glob("*.safetensors")) > 2 * _ALLOWED_BYTES
    assert run_ranks(_under_a_limit, 1, tmp_path) == [True]  # and the limit did hold
    assert_bit_equal(folder_tensors(tmp_path / "back"), folder_tensors(hf))
