"""Gradients of the log-probs equal transformers' however sequences and layers are split, with any recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.forward import run_stage, target_logprobs
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, empty_batch, pack
from megatron_rlt.models.weights.export import Destination, export_tensors
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout, build_layout
from tests.models.dense import random_sequences
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TEMPERATURE = 0.7
VOCAB_SIZE = 131
TOLERANCE = 1e-5
LAYOUTS = {1: [LayoutConfig()], 2: [LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(cp=2)]}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
def test_gradients_equal_transformers(world_size: int, family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path, family, tied=tied, seed=3)
    torch.save(_dense_gradients(folder), folder / "gradients.pt")
    for errors, changed_by_recomputation in run_ranks(_gradient_errors, world_size, folder, LAYOUTS[world_size]):
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
        assert changed_by_recomputation == []


def test_a_batch_of_padding_has_zero_gradient(tmp_path: Path) -> None:
    assert run_ranks(_gradient_of_nothing, 1, tiny_hf_model(tmp_path, "llama", tied=False)) == [0.0]


def _dense_gradients(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, sequence in enumerate(random_sequences(VOCAB_SIZE)):
        logprobs = torch.log_softmax(model(sequence.token_ids[None]).logits[0] / TEMPERATURE, -1)
        at = sequence.target_positions
        ((1 + index) * logprobs[at - 1, sequence.token_ids[at]]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _gradient_errors(folder: Path, layouts: list[LayoutConfig]) -> tuple[dict[str, float], list[str]]:
    """Largest error of each tensor's gradient, relative to its largest entry; and what recomputation changed."""
    dense = torch.load(folder / "gradients.pt")
    errors, changed = {}, []
    for layout in map(build_layout, layouts):
        plain: dict[str, Tensor] = {}
        for recompute in ("none", "selective", "full"):
            found = _gradients(folder, layout, recompute)
            plain = plain or found
            changed += [f"{layout} {recompute} {name}" for name in plain if not torch.equal(plain[name], found[name])]
        assert plain.keys() == dense.keys()
        for name, gradient in plain.items():
            errors[f"{layout} {name}"] = float((gradient - dense[name]).abs().max() / dense[name].abs().max())
    return errors, changed


def _gradients(folder: Path, layout: Layout, recompute: str) -> dict[str, Tensor]:
    architecture = Architecture.from_folder(folder)
    model = build_model(architecture, layout, dtype=torch.float32, recompute=recompute)
    load_hf_weights(model, folder)
    sequences = random_sequences(VOCAB_SIZE)
    weights = [torch.full((sequence.num_targets,), 1.0 + index) for index, sequence in enumerate(sequences)]
    with layout:
        for batch in pack(
            sequences, range(5), max_tokens=40, max_sequences=None, alignment=alignment_of(layout, token_multiple=1)
        ):
            logprobs, _ = target_logprobs(
                model, run_stage(model, batch), batch, temperature=TEMPERATURE, row_block=5, vocab_block=64
            )
            (logprobs * batch.join(weights)).sum().backward()
        _sum_over_ranks(model)
    # A gradient has its parameter's layout: the export of weights puts it together.
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    return dict(export_tensors(model, destination=Destination.ALL_RANKS))


def _sum_over_ranks(model: LanguageModel) -> None:
    """What Megatron's finalize_model_grads does to parameters whose ranks saw different parts of the sequences."""
    layout = model.layout
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad, group=layout.cp_group)
        is_split = layout.sp and hasattr(parameter, "sequence_parallel") and parameter.sequence_parallel
        if is_split or "q_layernorm" in name or "k_layernorm" in name:
            dist.all_reduce(parameter.grad, group=layout.tp_group)


def _gradient_of_nothing(folder: Path) -> float:
    layout, architecture = build_layout(LayoutConfig()), Architecture.from_folder(folder)
    model = build_model(architecture, layout, dtype=torch.float32, recompute="full")
    load_hf_weights(model, folder)
    batch = empty_batch(alignment_of(layout, token_multiple=1))
    with layout:
        logprobs, _ = target_logprobs(
            model, run_stage(model, batch), batch, temperature=TEMPERATURE, row_block=5, vocab_block=64
        )
        logprobs.sum().backward()
    return sum(float(parameter.grad.abs().sum()) for parameter in model.parameters() if parameter.grad is not None)
