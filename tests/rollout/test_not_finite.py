"""Weights and logits that are not finite end a run with one line, and are never an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest, require_finite
from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.types import StoppedError
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.rollout.test_vllm_settings import Letters
from tests.tiny_models import tiny_hf_model

REQUEST = SampleRequest(torch.arange(5), seed=1)
BROKEN = {
    "model.norm.weight": (float("nan"), (3,)),
    "model.embed_tokens.weight": (float("inf"), (130, 63)),
    "lm_head.weight": (float("-inf"), (0, 0)),
    "model.layers.2.mlp.down_proj.weight": (float("nan"), (5, 90)),
    "model.layers.3.self_attn.k_proj.bias": (float("nan"), (31,)),
}


def with_value(folder: Path, name: str, value: float, place: tuple[int, ...]) -> Path:
    """A small model in which one weight has this value."""
    tiny_hf_model(folder, "qwen2", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights[name][place] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusals(folders: Sequence[Path], layout_config: LayoutConfig) -> list[str]:
    """What loading each folder says on this rank; empty where it loads."""
    said = []
    for folder in folders:
        try:
            loaded_model(folder, build_layout(layout_config), torch.bfloat16)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(tp=2), LayoutConfig(pp=2)], ids=["1", "tp2", "pp2"])
def test_weights_that_are_not_finite_are_refused_by_name_in_every_layout(layout: LayoutConfig, tmp_path: Path) -> None:
    folders = {name: with_value(tmp_path / name, name, *broken) for name, broken in BROKEN.items()}
    by_rank = run_ranks(refusals, layout.tp * layout.pp, list(folders.values()), layout)
    for index, (name, folder) in enumerate(folders.items()):
        said = [ranks[index] for ranks in by_rank if ranks[index]]
        assert said, f"{name} was loaded"
        assert all(f"{folder / 'model.safetensors'}: {name} holds 1 values that are not finite" in one for one in said)


def sampling_faults(folder: Path, layouts: Sequence[LayoutConfig]) -> list[str]:
    said = []
    for config in layouts:
        model = loaded_model(folder, build_layout(config), torch.float32)
        for greedy, top_p in ((True, 1.0), (False, 1.0), (False, 0.9)):
            engine = MegatronEngine(
                model,
                temperature=0.7,
                top_p=top_p,
                greedy=greedy,
                num_token_ids=131,
                max_completion_tokens=4,
                max_batch_size=4,
                max_prefill_tokens=64,
                stop=lambda _: False,
            )
            with pytest.raises(StoppedError) as stopped:
                engine.generate([REQUEST, REQUEST], policy_version=0)
            said.append(str(stopped.value))
    return said


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_logits_that_overflow_end_the_sampling(value: float, tmp_path: Path) -> None:
    folder = with_value(tmp_path / "model", "model.norm.weight", value, (slice(None),))  # type: ignore[arg-type]
    for said in run_ranks(sampling_faults, 2, folder, [LayoutConfig(tp=2), LayoutConfig(pp=2)]):
        assert len(said) == 6
        assert all(
            one.startswith("the model's logits are not finite: token 1 after a prompt of 5 tokens") for one in said
        )
        assert all(len(one.splitlines()) == 1 for one in said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_an_engine_of_another_program_that_gives_no_number_is_refused(value: float | None) -> None:
    sampling = Sampling(1.0, 1.0, 27, 27, 8, Letters())
    with pytest.raises(StoppedError, match="token 2 after a prompt of 5 tokens"):
        sampling.completion([1, 2, 0], [-0.5, value, -0.1], "stop", REQUEST, 0)
    assert len(sampling.completion([1, 2, 0], [-0.5, -0.2, 0.0], "stop", REQUEST, 0).token_ids) == 3


def test_the_place_is_counted_in_the_whole_completion() -> None:
    with pytest.raises(StoppedError, match="token 8 after"):
        require_finite([float("nan")], REQUEST, first=7)
