"""What a rank reads from disk, where it lands, and what loading refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights import hf_reader
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout, build_layout
from tests.models.loading import folder_tensors, loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


class _CountedSlice:
    """A safetensors slice that notes how many elements each read of values returned."""

    def __init__(self, part: Any, counts: list[int]) -> None:
        self._part, self._counts = part, counts
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, chosen: Any) -> torch.Tensor:
        values: torch.Tensor = self._part[chosen]
        self._counts.append(values.numel())
        return values


def _counting(safe_open: Any, reads: dict[str, list[int]]) -> Any:
    class CountedFile:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = safe_open(*args, **options)
            self.keys = self._file.keys

        def __enter__(self) -> CountedFile:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> _CountedSlice:
            return _CountedSlice(self._file.get_slice(name), reads.setdefault(name, []))

    return CountedFile


def _count_reads(folder: Path) -> dict[str, list[int]]:
    layout = build_layout(LayoutConfig(tp=2, pp=2))
    reads: dict[str, list[int]] = {}
    hf_reader.safe_open = _counting(hf_reader.safe_open, reads)  # this process ends with the test
    loaded_model(folder, layout, torch.float32)
    return reads


def test_each_rank_reads_its_own_part_of_each_tensor_once(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path, "qwen3", tied=False, max_shard_size="60KB")
    by_rank = run_ranks(_count_reads, 4, folder)
    tensors = folder_tensors(folder)
    for name, tensor in tensors.items():
        counts = [reads[name] for reads in by_rank]
        assert all(len(count) <= 1 for count in counts), f"{name} was read twice on one rank: {counts}"
        assert sum(bool(count) for count in counts) == 2, f"{name} belongs to one stage: {counts}"
        copies = 2 if tensor.dim() == 1 else 1  # a norm goes whole to both tensor-parallel ranks
        assert sum(sum(count) for count in counts) == copies * tensor.numel(), name
    num_elements = sum(tensor.numel() for tensor in tensors.values())
    largest_share = max(sum(sum(count) for count in reads.values()) for reads in by_rank) / num_elements
    assert largest_share < 0.27  # a quarter, and the norms


def _hidden(model: LanguageModel, token_ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(token_ids.numel()).unsqueeze(0)
    with torch.no_grad():
        return model(token_ids.unsqueeze(0), positions, None).squeeze(1)


def _logits_before_and_after_a_roll(folder: Path, token_ids: torch.Tensor) -> tuple[Any, Any]:
    layout = build_layout(LayoutConfig())
    model = loaded_model(folder, layout, torch.float32)
    with layout:
        logits = _hidden(model, token_ids) @ model.output_weight().detach().T
        qkv = model.decoder.layers[1].self_attention.linear_qkv.weight
        qkv.data.copy_(qkv.data.roll(1, dims=0))
        rolled = _hidden(model, token_ids) @ model.output_weight().detach().T
    return logits.numpy(), rolled.numpy()


def test_logits_equal_transformers_and_notice_a_qkv_weight_rolled_by_one_row(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path, "qwen2", tied=False)
    token_ids = torch.arange(3, 131, 9)
    ((logits, rolled),) = run_ranks(_logits_before_and_after_a_roll, 1, folder, token_ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(token_ids.unsqueeze(0)).logits[0].numpy()
    assert abs(logits - expected).max() < 2e-5
    assert abs(rolled - expected).max() > 0.1


def _load_under_transformer_engine_names(folder: Path) -> None:
    layout = build_layout(LayoutConfig(pp=2))
    model = loaded_model(folder, layout, torch.float32)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for layer in model.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            linear.register_parameter("layer_norm_weight", norm.weight)
            del norm.weight
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dict(model.named_parameters())
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    load_hf_weights(model, folder)
    by_size = {tuple(tensor.flatten().tolist()) for tensor in expected}
    assert {tuple(parameter.flatten().tolist()) for parameter in model.parameters()} == by_size


def test_norms_named_as_in_transformer_engines_spec_are_filled(tmp_path: Path) -> None:
    run_ranks(_load_under_transformer_engine_names, 2, tiny_hf_model(tmp_path, "llama", tied=True))


def _refusals(folders: list[Path]) -> list[str]:
    layout = build_layout(LayoutConfig(tp=2))
    return [_refusal(folder, layout) for folder in folders]


def _refusal(folder: Path, layout: Layout) -> str:
    try:
        loaded_model(folder, layout, torch.float32)
    except ValueError as error:
        return str(error)
    return "loaded"


def _with_output_layer(folder: Path, *, change: float) -> Path:
    """A tied model whose file holds an output layer that differs from the embedding by `change` in one place."""
    tensors = folder_tensors(tiny_hf_model(folder, "llama", tied=True))
    output = tensors["model.embed_tokens.weight"].clone()
    output[130, 63] += change  # the last row: the second tensor-parallel rank reads it
    save_file({**tensors, "lm_head.weight": output}, folder / hf_reader.SINGLE_FILE)
    return folder


def test_loading_refuses_an_untied_output_layer_and_split_key_value_heads(tmp_path: Path) -> None:
    folders = [
        _with_output_layer(tmp_path / "repeats", change=0.0),
        _with_output_layer(tmp_path / "differs", change=0.5),
        tiny_hf_model(tmp_path / "one-head", "llama", tied=True, num_kv_heads=1),
    ]
    first, second = run_ranks(_refusals, 2, folders)
    assert second[0] == "loaded"
    assert "lm_head.weight differs from model.embed_tokens.weight; set tie_word_embeddings to false" in second[1]
    for refusals in (first, second):
        assert "num_key_value_heads must be a multiple of tp, got 1 and tp=2; choose a tp that" in refusals[2]
