"""Rules about the files and folders that a configuration names; nothing is created or loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rlt.config.folders.description import is_hugging_face, tokenizer_in
from megatron_rlt.config.folders.kind import TOKENIZER_FILES
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.reward import RewardConfig

HUB = "hf://"  # before the name of a Hugging Face data set
_ROW_FILES = (".jsonl", ".parquet")


def model_faults(models: dict[str, ModelConfig]) -> list[str]:
    faults = []
    for name, model in models.items():
        folder = model.model
        if not folder.is_dir():
            faults.append(
                f"{name}.model: no such folder: {folder}; give a model folder on disk"
                " (`hf download NAME --local-dir FOLDER` fetches one)"
            )
            continue
        if not is_hugging_face(folder):
            faults += _tokenizer_faults(name, folder)
            continue
        if not any(folder.glob("*.safetensors")):
            faults.append(f"{name}.model: {folder} holds no *.safetensors; save the model with safetensors")
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            faults.append(
                f"{name}.model: {folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from the model"
            )
    return faults


def _tokenizer_faults(name: str, folder: Path) -> list[str]:
    """Of a folder that is not Hugging Face's."""
    try:
        tokenizer_in(folder)
    except ValueError as error:
        return [f"{name}.model: {error}"]
    return []


def tokenizer_faults(teacher: ModelConfig, students: Mapping[str, ModelConfig], reward: RewardConfig) -> list[str]:
    """r_KL compares the very ids that the teacher sampled: there one id must mean one token to teacher and student."""
    if reward.lambda_kl == 0 and reward.kl_estimator != "full":
        return []
    faults = []
    for name, student in students.items():
        try:
            difference = _tokenizer_difference(tokenizer_in(teacher.model), tokenizer_in(student.model))
        except (ValueError, KeyError, TypeError) as error:
            faults.append(
                f"{name}.model: tokenizer.json of teacher or student is not readable ({error}); download it again"
            )
            continue
        if difference is not None and reward.lambda_kl != 0:
            faults.append(
                f"{name}.model: {difference}, and r_KL compares token by token and needs one tokenizer; set"
                " reward.lambda_kl=0 to reward r_SS alone, or take a student with the teacher's tokenizer"
            )
        elif difference is not None:
            faults.append(
                f"reward.kl_estimator=full: compares two distributions over one vocabulary, and {difference};"
                " leave kl_estimator out, with reward.lambda_kl=0 it is not part of the reward"
            )
    return faults


def _tokenizer_difference(teacher: Path, student: Path) -> str | None:
    """How a student's tokenizer differs from its teacher's, in words; None where all ids mean the same."""
    shared = [name for name in TOKENIZER_FILES if (teacher / name).is_file() and (student / name).is_file()]
    if "tokenizer.json" not in shared:
        equal = any((teacher / name).read_bytes() == (student / name).read_bytes() for name in shared)
        return None if equal or not shared else "without tokenizer.json beside both models its ids are not comparable"
    ours, theirs = _token_ids(teacher), _token_ids(student)
    differing = sorted({token for token, _ in ours.items() ^ theirs.items()})
    if not differing:
        return None
    token = differing[0]
    return (
        f"its tokenizer differs from the teacher's in {len(differing)} tokens (token {token!r} has id"
        f" {ours.get(token, 'none')} for the teacher, {theirs.get(token, 'none')} for the student)"
    )


def _token_ids(folder: Path) -> dict[str, int]:
    """Ids of all tokens, added ones included, as transformers reads them from a folder."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in content["added_tokens"]}
    settings = folder / "tokenizer_config.json"
    added = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder") if settings.is_file() else {}
    return ids | {token["content"]: int(token_id) for token_id, token in (added or {}).items()}


def data_faults(key: str, path: Path) -> list[str]:
    if path.is_dir():
        if any(path.rglob("*.tar")):
            return []
        return [f"{key}: {path} holds no shards (*.tar); run `megatron-rlt prepare` with output_dir={path}"]
    if not path.exists():
        return [f"{key}: no such folder or file: {path}; `megatron-rlt prepare` writes a folder of shards"]
    return row_file_faults(key, path)


def row_file_faults(key: str, file: Path) -> list[str]:
    if not file.is_file():
        return [f"{key}: no such file: {file}; give a .jsonl or .parquet file"]
    if file.suffix not in _ROW_FILES:
        return [f"{key}: {file} must end in .jsonl or .parquet; convert or rename it"]
    return []


def folder_faults(key: str, folder: Path) -> list[str]:
    """The folder may not exist yet, but it must be possible to make it and to write into it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"{key}: {existing} is a file; give a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {existing} is not writable; give a folder you may write to"]
    return []


def count_rows(data: Path) -> int | None:
    """Rows of a JSONL file, good or bad, or of prepared shards by their index; None where only reading would tell."""
    if data.suffix == ".jsonl":
        with data.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    index = data / ".nv-meta" / ".info.json"
    if not index.is_file():
        return None
    counts: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))["shard_counts"]
    return sum(counts.values())
