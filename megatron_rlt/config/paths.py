"""Rules about the files and folders that a configuration names; nothing is created or loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.config.folders.kind import TOKENIZER_FILES
from megatron_rlt.config.model_files import token_ids
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.given_files import read_json_object

HUB = "hf://"  # before the name of a Hugging Face data set
_ROW_FILES = (".jsonl", ".parquet")


def tokenizer_faults(teacher: ModelConfig, students: Mapping[str, ModelConfig], reward: RewardConfig) -> list[str]:
    """r_KL compares the very ids that the teacher sampled: there one id must mean one token to teacher and student."""
    if reward.lambda_kl == 0 and reward.kl_estimator != "full":
        return []
    faults = []
    for name, student in students.items():
        try:
            difference = _tokenizer_difference(tokenizer_in(teacher.model), tokenizer_in(student.model))
        except (ValueError, OSError):  # `model_faults` names the file
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
    ours, theirs = token_ids(teacher), token_ids(student)
    differing = sorted({token for token, _ in ours.items() ^ theirs.items()})
    if not differing:
        return None
    token = differing[0]
    return (
        f"its tokenizer differs from the teacher's in {len(differing)} tokens (token {token!r} has id"
        f" {ours.get(token, 'none')} for the teacher, {theirs.get(token, 'none')} for the student)"
    )


def data_faults(key: str, path: Path) -> list[str]:
    if path.is_dir():
        if any(path.rglob("*.tar")):
            return []
        return [f"{key}: {path} holds no shards (*.tar); run `megatron-rlt prepare` with output_dir={path}"]
    if not path.exists():
        remedy = "`megatron-rlt prepare` writes shards, `megatron-rlt collect` rows for sft"
        return [f"{key}: no such folder or file: {path}; {remedy}"]
    return row_file_faults(key, path)


def row_file_faults(key: str, file: Path) -> list[str]:
    if not file.is_file():
        return [f"{key}: no such file: {file}; give a .jsonl or .parquet file"]
    if file.suffix not in _ROW_FILES:
        return [f"{key}: {file} must end in .jsonl or .parquet; convert or rename it"]
    return []


def folder_faults(key: str, folder: Path) -> list[str]:
    """The folder may not exist yet, but it must be possible to make it and to write into it."""
    target = Path(os.path.realpath(folder))  # a link to a folder that is not there yet is made there
    existing = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "is a link that leads to itself" if existing.is_symlink() else "is a file"
        return [f"{key}: {existing} {what}; give a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {existing} is not writable; give a folder you may write to"]
    return []


def output_file_faults(key: str, file: Path) -> list[str]:
    """A Parquet file that a command writes; its folder may not exist yet."""
    if file.suffix != ".parquet" or file.is_dir():
        return [f"{key}: {file} must be a Parquet file to write; give a name that ends in .parquet"]
    return folder_faults(key, Path(os.path.realpath(file)).parent)


def count_rows(data: Path) -> int | None:
    """Rows of a JSONL file, good or bad, or of prepared shards by their index; None where only reading would tell."""
    if data.suffix == ".jsonl":
        with data.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    index = data / ".nv-meta" / ".info.json"
    if not index.is_file():
        return None
    counts = read_json_object(index, remedy="prepare the data again").get("shard_counts")
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise ValueError(f"{index}: holds no shard_counts; prepare the data again")
    return sum(counts.values())
