"""Resuming continues a training bit for bit, and resharding keeps every weight and moment."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rlt.checkpoint.folders import find_resumable
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.config.training import Reshardable
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


def _draws() -> list[Any]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


@pytest.mark.parametrize("extra", [b"", b"mine"])
def test_rank_state_survives_its_bytes(extra: bytes) -> None:
    state = RankState.capture(extra=extra)
    assert RankState.from_bytes(state.to_bytes(), Path("here")) == state


Sizes = tuple[int, int, int]  # tp, pp, cp


def _interrupted(
    model: Path, folder: Path, sizes: Sizes, dtype: torch.dtype, reshardable: Reshardable
) -> dict[str, Any]:
    layout = layout_of(*sizes)
    whole = tiny_training(model, layout, dtype)
    for _ in range(3):
        whole.update()
    random.seed(dist.get_rank()), np.random.seed(dist.get_rank()), torch.manual_seed(dist.get_rank())
    whole.save(folder, reshardable=reshardable)
    draws = _draws()
    losses = [whole.update() for _ in range(3)]

    resumed = tiny_training(model, layout, dtype)
    with torch.no_grad():
        for weight in resumed.reference.parameters():
            weight.zero_()
    info = find_resumable(folder, group=dist.group.WORLD)
    assert info is not None
    loaded = resumed.load(info)
    assert loaded.rank_state is not None
    loaded.rank_state.restore_rng()
    found = {"draws": _draws() == draws, "extra": loaded.rank_state.extra, "shared": loaded.shared, "step": loaded.step}
    found["losses"] = [resumed.update() for _ in range(3)] == losses
    pairs = list(zip(whole.state_bits(), resumed.state_bits(), strict=True))
    found["bits"] = all(torch.equal(expected, seen) for expected, seen in pairs)
    return found


@pytest.mark.parametrize(
    ("sizes", "dtype", "reshardable"),
    [
        ((2, 1, 1), torch.float32, "full"),
        ((1, 2, 1), torch.float32, "full"),
        ((1, 1, 2), torch.float32, "full"),
        ((1, 1, 1), torch.float32, "full"),
        ((1, 1, 1), torch.bfloat16, "full"),
        ((2, 1, 1), torch.bfloat16, "tp_pp"),
        ((1, 2, 1), torch.float32, "tp_pp"),
        ((1, 1, 1), torch.bfloat16, "tp_pp"),
    ],
    ids=["tp2", "pp2", "cp2", "dp2", "dp2-bf16", "tp2-own-parts", "pp2-own-parts", "dp2-own-parts"],
)
def test_three_steps_and_three_resumed_equal_six(
    tmp_path: Path, sizes: Sizes, dtype: torch.dtype, reshardable: Reshardable
) -> None:
    model = tiny_hf_model(tmp_path / "hf", "qwen2", tied=sizes[1] == 1, num_layers=2, dtype=dtype)
    for found in run_ranks(_interrupted, 2, model, tmp_path / "checkpoints", sizes, dtype, reshardable):
        assert found["losses"]
        assert found["bits"]
        assert found["draws"]
        assert (found["step"], found["extra"]) == (3, b"mine")
        assert found["shared"].data_position == b"row 17"
        assert found["shared"].counters == {"skipped": 2, "best": 0.1}


def _train_and_save(model: Path, folder: Path, sizes: Sizes, reshardable: Reshardable = "full") -> float:
    training = tiny_training(model, layout_of(*sizes))
    for _ in range(3):
        training.update()
    training.save(folder, reshardable=reshardable)
    return training.update()


def _load_and_save(model: Path, source: Path, target: Path, sizes: Sizes) -> tuple[float, bool]:
    training = tiny_training(model, layout_of(*sizes))
    info = find_resumable(source, group=None)
    assert info is not None
    loaded = training.load(info)
    training.save(target)
    return training.update(), loaded.rank_state is None


def _differences(before: Path, after: Path) -> dict[str, bool]:
    """By part and key of the two checkpoints' whole tensors: whether they agree in the 131 rows of the vocabulary."""
    same = {}
    for part in ("models/policy", "models/reference", "optimizer"):
        old, new = (dist_checkpointing.load_plain_tensors(str(folder / part)) for folder in (before, after))
        assert old.keys() == new.keys()
        for key, tensor in ((key, value) for key, value in old.items() if isinstance(value, torch.Tensor)):
            rows = 131 if "embedding" in key or "output_layer" in key else tensor.shape[0]
            same[f"{part}/{key}"] = torch.equal(tensor[:rows], new[key][:rows]) and bool(tensor.abs().sum() > 0)
    return same


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1, 1), (1, 2, 1)), ((1, 1, 1), (2, 1, 1)), ((1, 1, 2), (1, 2, 1))],
    ids=["tp2-to-pp2", "dp2-to-tp2", "cp2-to-pp2"],
)
def test_another_layout_gets_the_same_weights_moments_and_next_loss(
    tmp_path: Path, before: Sizes, after: Sizes
) -> None:
    """TP2 pads the vocabulary of 131 rows to 132, the others do not: what must agree are the 131."""
    model = tiny_hf_model(tmp_path / "hf", "qwen3", tied=False, num_layers=2)
    source, target = tmp_path / "before", tmp_path / "after"
    (next_loss, _) = run_ranks(_train_and_save, 2, model, source, before)
    for loss, is_new_layout in run_ranks(_load_and_save, 2, model, source, target, after):
        assert is_new_layout
        assert loss == pytest.approx(next_loss, abs=1e-5)
    (same,) = run_ranks(_differences, 1, source / "step-000003", target / "step-000003")
    assert [key for key, equal in same.items() if not equal] == []
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert f"optimizer/optimizer.state.{name}.output_layer.weight" in same
