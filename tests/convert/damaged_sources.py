"""Damaged and strange model folders: what is done to a good one, and the line that a user gets."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_rlt.models.weights.chunk_writer import ChunkWriter

ITERATION, BRIDGE = "release", "iter_0000000"


class RunsCode:
    """A pickle of it calls `os.system`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was_run",)


@dataclass(frozen=True)
class Damaged:
    """One case: the good folder it begins with, the damage, the options of the command, and part of the line."""

    kind: str
    damage: Callable[[Path], None]
    line: str
    options: tuple[str, ...] = ()


def _edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def _edit_yaml(name: str, section: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = yaml.safe_load((folder / name).read_text())
        content[section] |= changes
        (folder / name).write_text(yaml.safe_dump(content))

    return edit


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _cut(pattern: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = next(folder.glob(pattern))
        os.truncate(file, file.stat().st_size // 2)

    return cut


def _remove(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _scramble(folder: Path) -> None:
    """Overwrite the middle of the tensors' file: its length stays."""
    file = folder / ITERATION / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    file.write_bytes(content)


def _arguments(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / ITERATION / "common.pt"
        common = torch.load(file, weights_only=False)
        common["args"] = argparse.Namespace(**{**vars(common["args"]), **changes})
        torch.save(common, file)

    return edit


def _crafted_metadata(folder: Path) -> None:
    (folder / ITERATION / ".metadata").write_bytes(pickle.dumps(RunsCode()))


def _crafted_common(folder: Path) -> None:
    torch.save({"args": RunsCode()}, folder / ITERATION / "common.pt")


def _crafted_tensor(folder: Path) -> None:
    """A tensor's bytes are replaced by a pickle that runs code, in a folder that says it is a tensor."""
    weights = folder / ITERATION
    file, metadata = weights / "__0_0.distcp", pickle.loads((weights / ".metadata").read_bytes())
    index, place = next((i, p) for i, p in metadata.storage_data.items() if "word_embeddings" in i.fqn)
    with file.open("ab") as end:
        start = end.tell()
        torch.save(RunsCode(), end)
        place.offset, place.length = start, end.tell() - start
    metadata.storage_data[index] = place
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _outside(folder: Path) -> None:
    weights = folder / ITERATION
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../other.distcp"
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _lost_part(folder: Path) -> None:
    weights = folder / ITERATION
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _foreign_tensors(folder: Path) -> None:
    """Replace the weights by two tensors of something else."""
    _write_tensors(folder, {"encoder.weight": torch.ones(2, 2), "encoder.bias": torch.ones(2)})


def _fp8_tensors(folder: Path) -> None:
    shape = (131, 64)
    _write_tensors(folder, {"embedding.word_embeddings.weight": torch.ones(shape, dtype=torch.uint8)})


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    weights = folder / ITERATION
    common = torch.load(weights / "common.pt", weights_only=False)
    shutil.rmtree(weights)
    weights.mkdir()
    with ChunkWriter(weights, max_file_bytes=2**30) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(common)


def _old_format(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (folder / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt").touch()
    (folder / "latest_checkpointed_iteration.txt").write_text("5")


def _two_iterations(folder: Path) -> None:
    shutil.copytree(folder / BRIDGE, folder / "iter_0000010")
    (folder / "latest_checkpointed_iteration.txt").unlink()


def _lost_iteration(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("77")


def _only(*names: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).touch()

    return replace


def _dangling(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "gone")


def _python_tag(folder: Path) -> None:
    (folder / "context" / "model.yaml").write_text("config: !!python/object/apply:os.system ['touch was_run']")


def _roll_output(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit_json("config.json", tie_word_embeddings=True)(folder)


_YAML = "context/model.yaml"
_RUN_CONFIG = f"{BRIDGE}/run_config.yaml"
CASES: dict[str, Damaged] = {
    # Hugging Face
    "no weights": Damaged("hf", _remove("model.safetensors"), "config.json without *.safetensors"),
    "no configuration": Damaged("hf", _remove("config.json"), "safetensors without config.json; copy config.json"),
    "weights cut short": Damaged("hf", _cut("*.safetensors"), "damaged or cut short"),
    "missing tensor": Damaged(
        "hf", _edit_tensors(lambda t: t.__delitem__("model.norm.weight")), "missing tensors (1): model.norm.weight"
    ),
    "surplus tensor": Damaged(
        "hf", _edit_tensors(lambda t: t.update({"visual.weight": torch.ones(2)})), "surplus tensors (1): visual.weight"
    ),
    "wrong shape": Damaged("hf", _edit_json("config.json", intermediate_size=95), "wrong shapes (6)"),
    "integers": Damaged(
        "hf",
        _edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})),
        "model.norm.weight is I32",
    ),
    "two dtypes": Damaged(
        "hf",
        _edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})),
        "a Hugging Face folder has one dtype",
        ("--to", "hf"),
    ),
    "tied, other output layer": Damaged("hf", _roll_output, "config.json"),
    "pickled weights": Damaged("hf", _only("pytorch_model.bin", "config.json"), "pickled weights, which could run"),
    "adapter": Damaged("hf", _only("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter without its"),
    "link to nothing": Damaged("hf", _dangling, "which is not there; name the folder itself"),
    "empty folder": Damaged("hf", _only(), "no model: neither safetensors, nor .distcp files"),
    "wrong --from": Damaged("hf", lambda _: None, "--from nemo, but this is a Hugging Face folder", ("--from", "nemo")),
    # Megatron
    "no .metadata": Damaged("megatron", _remove(f"{ITERATION}/.metadata"), "tensor files without .metadata"),
    "missing shard": Damaged("megatron", _remove(f"{ITERATION}/__0_0.distcp"), "__0_0.distcp: missing, but its"),
    "shard cut short": Damaged("megatron", _cut(f"{ITERATION}/*.distcp"), "cut short:"),
    "scrambled shard": Damaged("megatron", _scramble, "damaged or more than a tensor, nothing was run"),
    ".metadata cut short": Damaged("megatron", _cut(f"{ITERATION}/.metadata"), "damaged or more than data"),
    ".metadata runs code": Damaged("megatron", _crafted_metadata, "it names posix.system, which no checkpoint needs"),
    "common.pt runs code": Damaged("megatron", _crafted_common, "it names posix.system, which no checkpoint needs"),
    "tensor runs code": Damaged("megatron", _crafted_tensor, "damaged or more than a tensor, nothing was run"),
    "tensors elsewhere": Damaged("megatron", _outside, "lies outside its folder, in '../../other.distcp'"),
    "lost part of a tensor": Damaged("megatron", _lost_part, "cover 6,144 of its 12,288 values"),
    "no arguments": Damaged("megatron", _remove(f"{ITERATION}/common.pt"), "does not say what model it is"),
    "mixture of experts": Damaged("megatron", _arguments(num_experts=8), "num_moe_experts=8 is not that of a dense"),
    "other number of layers": Damaged("megatron", _arguments(num_layers=3), "wrong shapes"),
    "larger vocabulary": Damaged("megatron", _arguments(vocab_size=140), "[131, 64], not [140, 64]"),
    "no GPT": Damaged("megatron", _foreign_tensors, "no tensor is called embedding.word_embeddings.weight"),
    "fp8 weights": Damaged("megatron", _fp8_tensors, "embedding.word_embeddings.weight is uint8"),
    "old format": Damaged("megatron", _old_format, "old format (model_optim_rng.pt"),
    "lost iteration": Damaged("megatron", _lost_iteration, "names 'iter_0000077', which is not there (there: release)"),
    # Megatron-Bridge
    "two iterations": Damaged("bridge", _two_iterations, "holds iterations iter_0000000, iter_0000010"),
    "no model section": Damaged("bridge", _edit_yaml(_RUN_CONFIG, "model", num_layers=None), "num_layers"),
    "LayerNorm": Damaged(
        "bridge",
        _edit_yaml(_RUN_CONFIG, "model", normalization="LayerNorm"),
        "normalization='LayerNorm'",
    ),
    # NeMo
    "no context": Damaged("nemo", _remove("context"), "a NeMo folder without context/"),
    "no weights folder": Damaged("nemo", _remove("weights"), "a NeMo folder without weights/"),
    "no model.yaml": Damaged("nemo", _remove(_YAML), "model.yaml: missing; copy the whole checkpoint"),
    "YAML runs code": Damaged("nemo", _python_tag, "not plain YAML, nothing in it was run"),
    "partial rotation": Damaged("nemo", _edit_yaml(_YAML, "config", rotary_percent=0.5), "rotary_percent=0.5"),
}
