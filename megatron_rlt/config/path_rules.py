"""Rules about the files and folders a configuration names, as lines that name key, path and remedy.

Looks, but creates and loads nothing: whether a model's `config.json` can be used is asked elsewhere.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from megatron_rlt.config.evaluation_sets import HUB, is_file, needs_hub
from megatron_rlt.config.jobs import (
    CollectConfig,
    EvaluateConfig,
    JobConfig,
    PrepareConfig,
    ReweighConfig,
    ScoreConfig,
    SftConfig,
    TrainConfig,
)
from megatron_rlt.config.sections import ModelConfig, RewardConfig
from megatron_rlt.config.solver import SolverConfig

_ROW_FILES = (".jsonl", ".parquet")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def train_path_faults(config: TrainConfig) -> list[str]:
    """Broken rules about the files of `train`."""
    students = {name: model for name, model in config.models.items() if name != "teacher"}
    return [
        *_model_faults(config.models),
        *chain(*(_tokenizer_faults(*one, teacher=config.teacher, reward=config.reward) for one in students.items())),
        *_data_faults("data.path", config.data.path),
        *_run_faults(config),
    ]


def solver_path_faults(config: SolverConfig) -> list[str]:
    """Broken rules about the files of `train` with a verifiable reward."""
    return [*_model_faults(config.models), *_data_faults("data.path", config.data.path), *_run_faults(config)]


def sft_path_faults(config: SftConfig) -> list[str]:
    """Broken rules about the files of `sft`."""
    faults = [*_model_faults({"model": config.model}), *_data_faults("data.path", config.data.path)]
    if config.evaluation is not None:
        held_out = config.evaluation.data
        faults += _data_faults("evaluation.data", held_out)
        if held_out.resolve() == config.data.path.resolve():
            faults.append(f"evaluation.data: {held_out} is data.path itself, so nothing is held out; give other rows")
    return [*faults, *_run_faults(config)]


def score_path_faults(config: ScoreConfig) -> list[str]:
    """Broken rules about the files of `score`."""
    faults = [
        *_model_faults({"teacher": config.teacher, "student": config.student}),
        *_tokenizer_faults("student", config.student, teacher=config.teacher, reward=config.reward),
        *_row_file_faults("input", config.input),
        *_run_faults(config),
    ]
    if config.output.suffix != ".parquet" or config.output.is_dir():
        faults.append(f"output: {config.output} must be a Parquet file to write; give a name that ends in .parquet")
    if config.output == config.input:
        faults.append(f"output: {config.output} would overwrite input; give another name")
    return faults


def reweigh_path_faults(config: ReweighConfig) -> list[str]:
    """Broken rules about the files of `reweigh`."""
    faults, output = [], config.output
    if not config.source.exists():
        faults.append(
            f"source: {config.source} does not exist; give a Parquet file of score or collect, or a run folder"
        )
    if output is not None and output.exists():
        faults.append(f"output: {output} exists, and nothing is overwritten; give another name, or remove it")
    elif output is not None and output.suffix != ".parquet":
        faults.append(f"output: {output} must be a Parquet file to write; give a name that ends in .parquet")
    return faults


def collect_path_faults(config: CollectConfig) -> list[str]:
    """Broken rules about the files of `collect`."""
    faults = _model_faults(config.models)
    if config.student is not None:
        faults += _tokenizer_faults("student", config.student, teacher=config.teacher, reward=config.reward)
    if config.teacher_checkpoint is not None and not (config.teacher_checkpoint / "manifest.json").is_file():
        faults.append(
            f"teacher_checkpoint: {config.teacher_checkpoint} holds no checkpoint (no manifest.json); give a folder"
            " `checkpoints/step-N` of a run"
        )
    return [*faults, *_data_faults("data", config.data), *_run_faults(config)]


def evaluate_path_faults(config: EvaluateConfig) -> list[str]:
    """Broken rules about the files of `evaluate`."""
    faults = [*_model_faults({"model": config.model}), *_run_faults(config)]
    if needs_hub(config) and find_spec("datasets") is None:
        faults.append(f"data: {config.data} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
    elif is_file(config):
        faults += _row_file_faults("data", Path(config.data))
    return faults


def prepare_path_faults(config: PrepareConfig) -> list[str]:
    """Broken rules about the files of `prepare`."""
    faults = _folder_faults("output_dir", config.output_dir)
    if not config.input:
        faults.append("input: is empty; name at least one .jsonl or .parquet file, or one hf://name[:split]")
    hub = [source for source in config.input if source.startswith(HUB)]
    if hub and len(config.input) > 1:
        faults.append(f"input: {hub[0]} must be the only input; prepare it and the files one by one")
    elif hub and find_spec("datasets") is None:
        faults.append(f"input: {hub[0]} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
    for source in config.input:
        if not source.startswith(HUB):
            faults += _row_file_faults("input", Path(source))
    return faults


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
