"""Weights go from a Hugging Face folder into Megatron shards and back without changing a bit, in any layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_rlt.models.weights.export import Destination, export_tensors, save_hf_folder
from megatron_rlt.parallel.layout import Layout, build_layout
from tests.models.loading import assert_bit_equal, folder_tensors, loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_TP2_PP2 = LayoutConfig(tp=2, pp=2)
_LAYOUTS = (  # on 4 ranks: with 4, 2, 2, 1 and 1 data-parallel replicas
    LayoutConfig(tp=1, pp=1),
    LayoutConfig(tp=2, pp=1, sp=True),
    LayoutConfig(tp=1, pp=2),
    LayoutConfig(tp=1, pp=4),
    LayoutConfig(tp=2, pp=2, sp=True),
)
_SMALL_SHARD_BYTES = 60_000  # an embedding of 131 x 64 float32 takes 33,536 bytes, a layer 142,336


@dataclasses.dataclass(frozen=True)
class _Case:
    family: str
    tied: bool
    dtype: torch.dtype
    sharded: bool

    def write(self, folder: Path) -> Path:
        shard_size = "60KB" if self.sharded else "50GB"
        return tiny_hf_model(folder, self.family, tied=self.tied, dtype=self.dtype, max_shard_size=shard_size)

    @property
    def max_shard_bytes(self) -> int:
        return _SMALL_SHARD_BYTES if self.sharded else 2**30


_CASES = [
    _Case(family, tied, dtype, sharded)
    for family in ("llama", "qwen2", "qwen3")
    for tied in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    for sharded in (False, True)
]


def _round_trip(root: Path, number: int, layout: Layout, target: str) -> None:
    case, source = _CASES[number], root / f"source-{number}"
    model = loaded_model(source, layout, case.dtype)
    save_hf_folder(model, source, root / target, max_shard_bytes=case.max_shard_bytes)
    assert (root / target).is_dir()  # on every rank, when the call returns


def _all_round_trips(root: Path) -> None:
    layout = build_layout(_TP2_PP2)
    for number in range(len(_CASES)):
        _round_trip(root, number, layout, f"target-{number}")
    for layout_config in _LAYOUTS:
        layout = build_layout(layout_config)
        for number in (1, len(_CASES) - 1):  # llama untied fp32, qwen3 tied bf16; both sharded
            _round_trip(root, number, layout, f"target-{number}-{layout}")


def test_round_trip_is_bit_equal_for_every_family_dtype_and_layout(tmp_path: Path) -> None:
    for number, case in enumerate(_CASES):
        folder = case.write(tmp_path / f"source-{number}")
        assert (folder / INDEX_FILE).exists() == case.sharded
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "optimizer.bin").write_bytes(b"not part of a model's configuration")
    run_ranks(_all_round_trips, 4, tmp_path)
    targets = sorted(tmp_path.glob("target-*"))
    assert len(targets) == len(_CASES) + 2 * len(_LAYOUTS)
    for target in targets:
        number = int(target.name.split("-")[1])
        source = tmp_path / f"source-{number}"
        assert_bit_equal(folder_tensors(target), folder_tensors(source))
        assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        assert (target / INDEX_FILE).exists() == _CASES[number].sharded
        assert (target / SINGLE_FILE).exists() != _CASES[number].sharded
        assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
        assert not (target / "optimizer.bin").exists()
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left


def _export_as_bfloat16(root: Path) -> dict[str, Any]:
    layout = build_layout(_TP2_PP2)
    model = loaded_model(root / "source", layout, torch.bfloat16)
    save_hf_folder(model, root / "source", root / "target", max_shard_bytes=_SMALL_SHARD_BYTES // 2)
    outcome: dict[str, Any] = {"overwrite": ""}
    try:
        save_hf_folder(model, root / "source", root / "target", max_shard_bytes=2**30)
    except ValueError as error:
        outcome["overwrite"] = str(error)
    to_all = dict(export_tensors(model, destination=Destination.ALL_RANKS))
    to_zero = dict(export_tensors(model, destination=Destination.RANK_ZERO))
    weight = model.embedding.word_embeddings.weight if layout.is_first_stage else model.output_layer.weight
    outcome["vocabulary"] = weight.detach().float().numpy().copy()
    for parameter in model.parameters():
        parameter.data.fill_(7.0)  # what was exported must not change with the model
    exported = folder_tensors(root / "target")
    assert_bit_equal(to_all, exported)
    if to_zero:
        assert_bit_equal(to_zero, exported)
    return {**outcome, "names": list(to_all), "num_at_zero": len(to_zero)}


def test_export_casts_cuts_padding_reaches_the_chosen_ranks_and_never_overwrites(tmp_path: Path) -> None:
    source = _Case("qwen2", tied=True, dtype=torch.float32, sharded=False).write(tmp_path / "source")
    results = run_ranks(_export_as_bfloat16, 4, tmp_path)
    target = tmp_path / "target"
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in folder_tensors(source).items()}
    assert_bit_equal(folder_tensors(target), expected)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(file.stat().st_size < _SMALL_SHARD_BYTES for file in target.glob("*.safetensors"))
    index = json.loads((target / INDEX_FILE).read_text())
    assert sorted(index["weight_map"]) == sorted(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())

    transformers_model = AutoModelForCausalLM.from_pretrained(target)
    assert transformers_model.dtype == torch.bfloat16
    assert torch.equal(transformers_model.lm_head.weight, expected["model.embed_tokens.weight"])

    for result in results:
        assert "never overwrites" in result["overwrite"]
        assert result["names"][0] == "model.embed_tokens.weight"
        assert result["names"][-1] == "model.norm.weight"
        layers = [int(name.split(".")[2]) for name in result["names"] if name.startswith("model.layers.")]
        assert layers == sorted(layers)
    assert [result["num_at_zero"] for result in results] == [len(expected), 0, 0, 0]
    # 131 rows on 2 ranks: 66 and 65 plus a row of zeros; the last stage's copy is the first stage's.
    embedding = expected["model.embed_tokens.weight"].float().numpy()
    for result in (results[0], results[2]):
        assert (result["vocabulary"] == embedding[:66]).all()
    for result in (results[1], results[3]):
        assert (result["vocabulary"][:65] == embedding[66:]).all()
        assert (result["vocabulary"][65] == 0).all()
