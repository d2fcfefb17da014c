"""Finds from a folder alone which kind of model it is: Hugging Face, Megatron, NeMo 2.0, Megatron-Bridge, FSDP.

Only names of files decide, and `.metadata` where they leave a doubt; nothing is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_rlt.config.folders.tensors import METADATA_FILE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
LATEST_FILE = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
COMMON_FILE = "common.pt"
NEMO_CONTEXT, NEMO_WEIGHTS = "context", "weights"
CHECKPOINT_MANIFEST = "manifest.json"
POLICY_MODEL = "models/policy"
_ITERATION = re.compile(r"iter_\d{7}|release")


class Kind(StrEnum):
    """What wrote a folder."""

    HF = "hf"
    MEGATRON = "megatron"
    NEMO = "nemo"
    BRIDGE = "bridge"
    FSDP = "fsdp"  # torch's distributed checkpoint of a Hugging Face model; read only


WRITTEN = (Kind.HF, Kind.MEGATRON, Kind.NEMO, Kind.BRIDGE)


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: where its parts lie."""

    kind: Kind
    folder: Path  # as the user named it
    weights: Path  # the folder of tensor files
    what: str  # for people, such as "Megatron-LM checkpoint, iteration 12"
    tokenizer: Path | None  # folder of tokenizer files
    beside: Path | None = None  # where a conversion leaves config.json, for what metadata has no words for


def find_model(folder: Path) -> ModelFolder:
    """Say what a folder is.

    Raises:
        ValueError: it is no model folder, or one that cannot be read: the message names what was found and the remedy.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: {_why_no_folder(folder)}")
    if (folder / NEMO_CONTEXT).is_dir() or (folder / NEMO_WEIGHTS / METADATA_FILE).is_file():
        return _nemo(folder)
    if (folder / CHECKPOINT_MANIFEST).is_file() and (folder / "models").is_dir():
        return _own_checkpoint(folder)
    if (folder / LATEST_FILE).is_file() or any(_iterations(folder)):
        return _iteration(folder, _named_iteration(folder))
    if (folder / METADATA_FILE).is_file():
        return _tensor_folder(folder)
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return ModelFolder(Kind.HF, folder, folder, "Hugging Face folder", _tokenizer_in(folder))
    raise ValueError(f"{folder}: {_why_no_model(folder)}")


def check_kind(found: ModelFolder, wanted: str | None) -> None:
    """Refuse a folder that the user calls by another kind. Raises ValueError with what was found."""
    if wanted is not None and found.kind != wanted:
        raise ValueError(
            f"{found.folder}: --from {wanted}, but this is a {found.what} ({found.kind}); leave --from out"
        )


def _why_no_folder(path: Path) -> str:
    if path.suffix == ".nemo":
        return "a NeMo 1.0 archive; convert it with NeMo <= 2.7.3 (scripts/checkpoint_converters) first"
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there; name the folder itself"
    return "a file; give the folder of the model" if path.exists() else "no such folder; give the folder of a model"


def _why_no_model(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "a LoRA adapter without its model; merge it into the model first (peft: merge_and_unload)"
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth")):
        return "pickled weights, which could run code; save the model with safetensors (transformers: save_pretrained)"
    if any(folder.rglob("model_optim_rng.pt")):
        return (
            "a checkpoint in Megatron's old format (model_optim_rng.pt, a pickle per rank); save it with"
            " `--ckpt-format torch_dist` (Megatron-LM reads both)"
        )
    if any(folder.glob("*.distcp")):
        return f"tensor files without {METADATA_FILE}, which is written last: the save did not end; take another one"
    if any(folder.glob("step-*")) or (folder / "checkpoints").is_dir():
        return "several checkpoints of a run; name one, such as checkpoints/step-000025"
    if any(folder.glob("*.safetensors")):
        return "safetensors without config.json; copy config.json from the model"
    if (folder / "config.json").is_file():
        return "config.json without *.safetensors; download the folder again"
    return "no model: neither safetensors, nor .distcp files, nor weights/ with context/; give the folder of a model"


def _nemo(folder: Path) -> ModelFolder:
    weights, context = folder / NEMO_WEIGHTS, folder / NEMO_CONTEXT
    if not weights.is_dir():
        raise ValueError(f"{folder}: a NeMo folder without weights/; copy the whole checkpoint")
    if not context.is_dir():
        raise ValueError(
            f"{folder}: a NeMo folder without context/, which says what model it is; copy the whole checkpoint, or"
            f" convert {weights} with --config and --tokenizer"
        )
    if not (weights / METADATA_FILE).is_file():
        raise ValueError(f"{weights}: holds no {METADATA_FILE}, which is written last: the save did not end")
    beside = context / "nemo_tokenizer"
    return ModelFolder(Kind.NEMO, folder, weights, "NeMo 2.0 folder", _tokenizer_in(beside, context), beside)


def _own_checkpoint(folder: Path) -> ModelFolder:
    weights = folder / POLICY_MODEL
    if not (weights / METADATA_FILE).is_file():
        raise ValueError(f"{weights}: holds no {METADATA_FILE}; the checkpoint is not complete: take another one")
    return ModelFolder(Kind.MEGATRON, folder, weights, f"checkpoint {folder.name} of this program, its policy", None)


def _iterations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _ITERATION.fullmatch(path.name) and path.is_dir())


def _named_iteration(folder: Path) -> Path:
    """The iteration that the folder's own file names, or its only one."""
    found = _iterations(folder)
    if (folder / LATEST_FILE).is_file():
        text = (folder / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
        name = text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text
        if folder / name not in found:
            there = ", ".join(path.name for path in found) or "none"
            raise ValueError(f"{folder}: {LATEST_FILE} names {name!r}, which is not there (there: {there}); name one")
        return folder / name
    if len(found) > 1:
        raise ValueError(
            f"{folder}: holds iterations {', '.join(path.name for path in found)} and no {LATEST_FILE} that chooses;"
            " name one of them"
        )
    return found[0]


def _iteration(named: Path, weights: Path) -> ModelFolder:
    if not (weights / METADATA_FILE).is_file():
        raise ValueError(f"{weights}: {_why_no_model(weights)}")
    number = "released weights" if weights.name == "release" else f"iteration {int(weights.name.partition('_')[2])}"
    return _with_run_config(named, weights, number)


def _with_run_config(named: Path, weights: Path, number: str) -> ModelFolder:
    is_bridge = (weights / RUN_CONFIG).is_file()
    kind, what = (Kind.BRIDGE, "Megatron-Bridge") if is_bridge else (Kind.MEGATRON, "Megatron-LM")
    tokenizer = _tokenizer_in(weights / "tokenizer", named / "tokenizer")
    what = f"{what} checkpoint, {number}".removesuffix(", ")
    return ModelFolder(kind, named, weights, what, tokenizer, weights / "tokenizer")


def _tensor_folder(folder: Path) -> ModelFolder:
    """A folder of tensor files that was named itself: an iteration, a model of our checkpoint, NeMo's weights, FSDP."""
    if _ITERATION.fullmatch(folder.name):
        return _iteration(folder, folder)
    if (folder / RUN_CONFIG).is_file():
        return _with_run_config(folder, folder, "")
    if (folder / COMMON_FILE).is_file():
        checkpoint = folder.parents[1]
        is_own = folder.parent.name == "models" and (checkpoint / CHECKPOINT_MANIFEST).is_file()
        what = (
            f"checkpoint {checkpoint.name} of this program, its {folder.name}" if is_own else "Megatron tensor folder"
        )
        return ModelFolder(Kind.MEGATRON, folder, folder, what, _tokenizer_in(folder / "tokenizer"))
    tokenizer = _tokenizer_in(folder, folder / "huggingface", folder.parent, folder.parent / "huggingface")
    return ModelFolder(Kind.FSDP, folder, folder, "distributed checkpoint of a Hugging Face model", tokenizer)


def _tokenizer_in(*folders: Path) -> Path | None:
    return next((place for place in folders if any((place / name).is_file() for name in TOKENIZER_FILES)), None)
