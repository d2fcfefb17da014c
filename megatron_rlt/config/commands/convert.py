"""`convert` and `inspect`: a model's folder in, another kind of folder or one screen out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from megatron_rlt.config.commands.job import CommandConfig
from megatron_rlt.config.folders.description import ModelDescription, describe_model
from megatron_rlt.config.folders.kind import TOKENIZER_FILES, Kind, check_kind
from megatron_rlt.config.folders.optimizer_state import HOLDERS, find_optimizer_state
from megatron_rlt.config.section import PositiveInt

NO_TOKENIZER = Path("none")
_CHECKPOINT_NAME = re.compile(r"step-\d{6,}")  # a run would take the folder for its newest checkpoint


class InspectConfig(CommandConfig):
    """Say what a model folder is: kind, architecture, size, dtype, layout it was saved in, what can be made of it."""

    source: Path
    """Model folder of any kind."""
    config: Path | None = None
    """Hugging Face folder whose config.json says what model it is, for a folder that does not say it."""

    def path_faults(self) -> list[str]:
        return _described(self.source, self.config, None)[1]


class ConvertConfig(CommandConfig):
    """Convert a model between Hugging Face, Megatron, NeMo 2.0 and Megatron-Bridge folders, and prove the result."""

    source: Path
    """Model folder; its kind is found from its files."""
    target: Path
    """Folder to write; it must not exist yet."""
    to: Literal["hf", "megatron", "nemo", "bridge"] | None = None
    """Kind to write; None: Hugging Face. A Hugging Face source needs it named."""
    source_kind: Literal["hf", "megatron", "nemo", "bridge", "fsdp"] | None = None
    """Kind that the source must be; None: whatever is found."""
    config: Path | None = None
    """Hugging Face folder whose config.json says what model it is, for a source that does not say it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, for a source without one; `none` writes none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype to write; None: the source's."""
    certify: Literal["logprobs", "none"] = "logprobs"
    """Proof beside the comparison of all tensors: log-probs of 8 fixed prompts by independent readers of both sides,
    which hold the whole model in float32; or none."""
    optimizer: bool = False
    """Take Adam's state along, from and to Megatron folders: main weights and moments in their own dtype, parameter
    groups, learning-rate schedule, iteration."""
    workers: PositiveInt = 1
    """Threads that read ahead, each a tensor."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """Largest file written, in bytes; a larger tensor gets its own."""

    def path_faults(self) -> list[str]:
        faults = []
        if self.target.exists() or self.target.is_symlink():
            faults.append(f"target: {self.target} exists, and nothing is overwritten; give another name, or remove it")
        if _CHECKPOINT_NAME.fullmatch(self.target.name):
            faults.append(
                f"target: {self.target.name} is the name of a run's checkpoint, which also holds the position in the"
                " data, counters and random numbers; give another name, and begin a run with the folder as its model"
            )
        given = self.tokenizer_folder
        if given is not None and not any((given / name).is_file() for name in TOKENIZER_FILES):
            faults.append(
                f"--tokenizer: {given} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); give the folder of one"
            )
            return faults
        described, unreadable = _described(self.source, self.config, self.tokenizer_folder)
        if described is None:
            return faults + unreadable
        try:
            check_kind(described.found, self.source_kind)
        except ValueError as fault:
            faults.append(str(fault))
        if self.to is None and described.found.kind is Kind.HF:
            faults.append(f"--to: {self.source} is a Hugging Face folder; say what it is to become, such as --to nemo")
        if described.tokenizer is None and self.tokenizer != NO_TOKENIZER:
            faults.append(
                f"--tokenizer: {self.source} holds no tokenizer; give the folder of one with --tokenizer FOLDER,"
                " or --tokenizer none for weights alone"
            )
        return faults + (self._optimizer_faults(described) if self.optimizer else [])

    def _optimizer_faults(self, described: ModelDescription) -> list[str]:
        if self.target_kind not in HOLDERS:
            return [f"--optimizer: {self.target_kind} folders get weights alone; use --to megatron or --to bridge"]
        try:
            find_optimizer_state(described)
        except ValueError as fault:
            return [f"--optimizer: {fault}"]
        return []

    @property
    def tokenizer_folder(self) -> Path | None:
        return None if self.tokenizer == NO_TOKENIZER else self.tokenizer

    @property
    def target_kind(self) -> Kind:
        return Kind.HF if self.to is None else Kind(self.to)


def _described(source: Path, config: Path | None, tokenizer: Path | None) -> tuple[ModelDescription | None, list[str]]:
    try:
        return describe_model(source, config=config, tokenizer=tokenizer), []
    except ValueError as fault:
        return None, [str(fault)]
    except PermissionError as fault:
        return None, [f"{fault.filename}: no permission to read it; give yourself the right to it"]
