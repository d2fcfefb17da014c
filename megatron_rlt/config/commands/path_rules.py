"""Rules about the files and folders a configuration names, as lines that name key, path and remedy.

Looks, but creates and loads nothing: whether a model's `config.json` can be used is asked elsewhere.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.sections import ModelConfig, RewardConfig

_ROW_FILES = (".jsonl", ".parquet")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _model_faults(models: dict[str, ModelConfig]) -> list[str]:
    faults = []
    for name, model in models.items():
        folder = model.model
        if not folder.is_dir():
            faults.append(
                f"{name}.model: no such folder: {folder}; give a Hugging Face folder on disk"
                " (`hf download NAME --local-dir FOLDER` fetches one)"
            )
            continue
        if not any(folder.glob("*.safetensors")):
            faults.append(f"{name}.model: {folder} holds no *.safetensors; save the model with safetensors")
        if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            faults.append(
                f"{name}.model: {folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy it from the model"
            )
    return faults


def _tokenizer_faults(name: str, student: ModelConfig, *, teacher: ModelConfig, reward: RewardConfig) -> list[str]:
    """r_KL compares the very ids the teacher sampled, so both must mean the same token by an id."""
    files = [folder / "tokenizer.json" for folder in (teacher.model, student.model)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    try:
        ours, theirs = (_token_ids(file) for file in files)
    except (ValueError, KeyError, TypeError) as error:
        return [f"{name}.model: tokenizer.json of teacher or student is not readable ({error}); download it again"]
    differing = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    missing = sorted(ours.keys() - theirs.keys())
    if reward.lambda_kl == 0 or not (differing or missing):
        return []
    token = (differing + missing)[0]
    return [
        f"{name}.model: its tokenizer differs from the teacher's in {len(differing) + len(missing)} tokens (token"
        f" {token!r} has id {ours[token]} for the teacher, {theirs.get(token, 'none')} for the student), and r_KL"
        " compares token by token and needs one tokenizer; set reward.lambda_kl=0 to reward r_SS alone, or take a"
        " student with the teacher's tokenizer"
    ]


def _token_ids(file: Path) -> dict[str, int]:
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in content["added_tokens"]}


def _data_faults(key: str, path: Path) -> list[str]:
    if path.is_dir():
        if any(path.rglob("*.tar")):
            return []
        return [f"{key}: {path} holds no shards (*.tar); run `megatron-rlt prepare` with output_dir={path}"]
    if not path.exists():
        return [f"{key}: no such folder or file: {path}; `megatron-rlt prepare` writes a folder of shards"]
    return _row_file_faults(key, path)


def _row_file_faults(key: str, file: Path) -> list[str]:
    if not file.is_file():
        return [f"{key}: no such file: {file}; give a .jsonl or .parquet file"]
    if file.suffix not in _ROW_FILES:
        return [f"{key}: {file} must end in .jsonl or .parquet; convert or rename it"]
    return []


def _run_faults(config: JobConfig) -> list[str]:
    faults = _folder_faults("output_dir", config.output_dir)
    if config.metrics.wandb and find_spec("wandb") is None:
        faults.append("metrics.wandb=true: needs the package `wandb`; pip install 'megatron-rlt[wandb]'")
    return faults


def _folder_faults(key: str, folder: Path) -> list[str]:
    """The folder may not exist yet, but it must be possible to make it and to write into it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"{key}: {existing} is a file; give a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {existing} is not writable; give a folder you may write to"]
    return []
