"""Describes the model in a folder of any kind: its architecture, the names its tensors have there, its tokenizer.

A folder without a Hugging Face configuration is described by its own metadata. No torch: a command's rules use this
before anything loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.kind import (
    CHECKPOINT_MANIFEST,
    COMMON_FILE,
    NEMO_CONTEXT,
    RUN_CONFIG,
    Kind,
    ModelFolder,
    find_model,
)
from megatron_rlt.config.folders.pickles import Record, read_torch_file
from megatron_rlt.config.folders.provider import architecture_from_arguments, architecture_from_provider
from megatron_rlt.config.folders.same_tensor import hold_the_same
from megatron_rlt.config.folders.tensors import METADATA_FILE, TensorFolder, read_tensor_folder

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_HF_EMBEDDING = "embed_tokens.weight"
_OPTIMIZER = "optimizer."
_TRAINED_SECTION = {"train": "teacher", "sft": "model", "rlvr": "student"}


@dataclass(frozen=True)
class ModelDescription:
    """A folder's model."""

    found: ModelFolder
    architecture: Architecture
    hf_folder: Path | None  # Hugging Face folder of the same model: its config.json and side files
    tokenizer: Path | None
    tensors: TensorFolder | None  # None of a Hugging Face folder
    prefix: str = ""  # before every tensor's name in `tensors`


def describe_model(folder: Path, *, config: Path | None = None, tokenizer: Path | None = None) -> ModelDescription:
    """Describe the model of a folder.

    Args:
        config: a Hugging Face folder whose config.json replaces the folder's own metadata.
        tokenizer: a folder of tokenizer files that replaces the folder's own.

    Raises:
        ValueError: the folder is no model, is damaged, does not say what model it is, or holds one that is not
            supported.
    """
    found = find_model(folder)
    if found.kind is Kind.HF:
        return ModelDescription(
            found, Architecture.from_folder(config or folder), config or folder, tokenizer or found.tokenizer, None
        )
    tensors = read_tensor_folder(found.weights)
    prefix = _prefix(tensors, found)
    if config is None and (begun_with := _begun_with(found)) is not None:
        model = describe_model(begun_with, tokenizer=tokenizer)
        return ModelDescription(found, model.architecture, model.hf_folder, model.tokenizer, tensors, prefix)
    hf_folder = config or _config_beside(found)
    architecture = Architecture.from_folder(hf_folder) if hf_folder is not None else _from_metadata(found)
    architecture = _completed(architecture, tensors, prefix, found, is_given=hf_folder is not None)
    if hf_folder is None and found.beside is not None and (found.beside / "config.json").is_file():
        # Taken where it says the same as the metadata.
        hf_folder = found.beside if Architecture.from_folder(found.beside) == architecture else None
    place = tokenizer or found.tokenizer or hf_folder
    return ModelDescription(found, architecture, hf_folder, place, tensors, prefix)


def architecture_in(folder: Path) -> Architecture:
    """The architecture of a folder's model. Raises ValueError as `describe_model`."""
    if _has_config(folder):  # its own faults are told before those of missing weights
        return Architecture.from_folder(folder)
    return describe_model(folder).architecture


def tokenizer_in(folder: Path) -> Path:
    """The folder of a model folder's tokenizer: itself, where it is Hugging Face's.

    Raises ValueError if there is none.
    """
    found = None if is_hugging_face(folder) else find_model(folder)
    place = folder if found is None else found.tokenizer or _config_beside(found)
    if found is not None and place is None and (begun_with := _begun_with(found)) is not None:
        return tokenizer_in(begun_with)
    if place is None:
        raise ValueError(
            f"{folder}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json of its model into"
            f" {folder / 'tokenizer'}, or convert it with --tokenizer FOLDER"
        )
    return place


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is, or was meant to be, Hugging Face's."""
    if _has_config(folder):
        return True
    try:
        return find_model(folder).kind is Kind.HF
    except ValueError:
        return True


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / METADATA_FILE).is_file()


def _config_beside(found: ModelFolder) -> Path | None:
    """The folder of config.json that lies beside a DCP folder."""
    if found.kind is not Kind.FSDP:
        return None
    here = (found.folder, found.folder / "huggingface", found.folder.parent, found.folder.parent / "huggingface")
    return next((place for place in here if (place / "config.json").is_file()), None)


def _begun_with(found: ModelFolder) -> Path | None:
    """The model folder that the run of a checkpoint of ours began with, as long as it is there."""
    checkpoint = next((place for place in found.weights.parents if (place / CHECKPOINT_MANIFEST).is_file()), None)
    if found.kind is not Kind.MEGATRON or checkpoint is None:
        return None
    record = {name: _yaml(checkpoint.parents[1] / name) for name in ("run.json", "config.yaml")}
    section = _TRAINED_SECTION.get(str(record["run.json"].get("command")))
    model = (record["config.yaml"].get(section) or {}).get("model") if section is not None else None
    return Path(model) if model is not None and Path(model).is_dir() else None


def _from_metadata(found: ModelFolder) -> Architecture:
    if found.kind is Kind.NEMO:
        file = found.folder / NEMO_CONTEXT / "model.yaml"
        return architecture_from_provider(_section(file, "config"), file)
    if found.kind is Kind.BRIDGE:
        file = found.weights / RUN_CONFIG
        return architecture_from_provider(_section(file, "model"), file)
    file = found.weights / COMMON_FILE
    if found.kind is Kind.MEGATRON and file.is_file():
        common = read_torch_file(file)
        arguments = common.get("args") if isinstance(common, dict) else None
        if isinstance(arguments, Record):
            return architecture_from_arguments(arguments.fields, file)
    raise ValueError(
        f"{found.folder}: {found.what} does not say what model it is; name the Hugging Face folder of the model, or one"
        " with its config.json: --config FOLDER"
    )


def _section(file: Path, name: str) -> Mapping[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"{file}: missing; copy the whole checkpoint, or name the model's config.json: --config FOLDER"
        )
    section = _yaml(file).get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{file}: holds no section {name!r}; copy the checkpoint again, or use --config FOLDER")
    return section


def _yaml(file: Path) -> dict[str, Any]:
    """A YAML or JSON file's keys; empty without the file. Tags, which could run code, are errors."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: not plain YAML, nothing in it was run ({' '.join(str(error).split())[:200]})"
        ) from error
    return content if isinstance(content, dict) else {}


def _prefix(tensors: TensorFolder, found: ModelFolder) -> str:
    """What stands before every tensor's name, such as NeMo's `module.`; optimizer state is left aside."""
    last = _HF_EMBEDDING if found.kind is Kind.FSDP else _EMBEDDING
    names = [name for name in tensors.tensors if name.endswith(last) and not name.startswith(_OPTIMIZER)]
    if found.kind is Kind.FSDP:  # Hugging Face's own names begin with `model.`
        names = [name for name in names if name.removesuffix(last).endswith("model.")]
        last = f"model.{last}"
    if not names:
        some = ", ".join(sorted(tensors.tensors)[:3]) or "none"
        raise ValueError(f"{found.folder}: no tensor is called {last}, as in a GPT; the first are: {some}")
    return min(names, key=len).removesuffix(last)


def _completed(
    architecture: Architecture, tensors: TensorFolder, prefix: str, found: ModelFolder, *, is_given: bool
) -> Architecture:
    """The vocabulary from the stored rows where nothing tells it; NeMo's copied embedding is a tied one."""
    if found.kind is Kind.FSDP:
        return architecture
    embedding, output = tensors.tensors[prefix + _EMBEDDING], tensors.tensors.get(prefix + _OUTPUT)
    rows = embedding.shape[0]
    # NeMo's configuration keeps a default of its class where the tokenizer decided.
    if architecture.vocab_size == 0 or (found.kind is Kind.NEMO and not is_given and architecture.vocab_size > rows):
        architecture = replace(architecture, vocab_size=rows)
    untied_by_nemo = found.kind is Kind.NEMO and not architecture.tied_embeddings and output is not None
    if untied_by_nemo and output is not None and hold_the_same(embedding, output):
        return replace(architecture, tied_embeddings=True)
    return architecture
