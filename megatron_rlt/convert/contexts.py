"""What Megatron-LM, NeMo 2.0 and Megatron-Bridge want beside the weights, and where each keeps what.

Nothing of these tools is imported: the files are theirs as found by reading what they write (see
`docs/how-to/convert.md`), and `make test-nemo` lets NeMo's own loader read them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.kind import LATEST_FILE, NEMO_CONTEXT, NEMO_WEIGHTS, RUN_CONFIG, Kind
from megatron_rlt.config.folders.optimizer_state import FULLY_RESHARDABLE, OptimizerState
from megatron_rlt.config.folders.provider import arguments_of, megatron_scaling_factor, provider_fields
from megatron_rlt.convert.nemo_context import write_context

_CONTENT: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_RELEASE = "release"  # weights alone: Megatron-LM starts counting at 0
_TRAIN_STATE = {
    "step": torch.tensor(0, dtype=torch.int32),
    "consumed_train_samples": torch.tensor(0, dtype=torch.int32),
    "skipped_train_samples": torch.tensor(0, dtype=torch.int32),
    "consumed_valid_samples": torch.tensor(0, dtype=torch.int32),
    "floating_point_operations_so_far": torch.tensor(0, dtype=torch.float64),
    **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
}
_BRIDGE_MODEL = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_BRIDGE_CONFIG = "megatron.bridge.training.config.ConfigContainer"


@dataclass(frozen=True)
class Beside:
    """Places in a folder of one kind, and what is written there besides tensors."""

    weights: str  # folder of tensor files, relative to the whole
    tokenizer: str
    prefix: str  # before every tensor's name
    common: Mapping[str, Any]  # content of common.pt
    copies_tied_output: bool
    write: Callable[[Path, torch.dtype], None]  # into the whole folder


def beside_weights(
    kind: Kind, architecture: Architecture, source: str, *, has_tokenizer: bool, optimizer: OptimizerState | None
) -> Beside:
    """What a kind wants besides tensors. Raises ValueError if the kind cannot express the architecture."""
    if kind is Kind.MEGATRON:
        return _megatron(architecture, source, optimizer)
    if kind is Kind.NEMO:
        assert optimizer is None, "no optimizer state is written for NeMo"
        return _nemo(architecture, source, has_tokenizer)
    assert kind is Kind.BRIDGE, f"{kind} is not written"
    return _bridge(architecture, source, optimizer)


def _training(optimizer: OptimizerState | None) -> dict[str, Any]:
    """What common.pt holds of training, as Megatron-LM and Megatron-Bridge save it."""
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": dict(_CONTENT)}
    if optimizer is None:
        return common
    common |= {"iteration": optimizer.iteration, "optimizer": dict(optimizer.common)}
    common["content_metadata"] = _CONTENT | {"distrib_optim_sharding_type": FULLY_RESHARDABLE}
    return common | ({} if optimizer.scheduler is None else {"opt_param_scheduler": dict(optimizer.scheduler)})


def _megatron(architecture: Architecture, source: str, optimizer: OptimizerState | None) -> Beside:
    common = {"args": argparse.Namespace(**arguments_of(architecture, source))} | _training(optimizer)
    name = _RELEASE if optimizer is None else f"iter_{optimizer.iteration:07d}"  # of a release it loads weights only

    def write(folder: Path, _dtype: torch.dtype) -> None:
        (folder / LATEST_FILE).write_text(name if optimizer is None else str(optimizer.iteration), encoding="utf-8")

    return Beside(name, f"{name}/tokenizer", "", common, False, write)


def _bridge(architecture: Architecture, source: str, optimizer: OptimizerState | None) -> Beside:
    factor = megatron_scaling_factor(architecture, source)
    model = {
        "_target_": _BRIDGE_MODEL,
        **provider_fields(architecture, source),
        **({} if factor is None else {"rope_scaling": True, "rope_scaling_factor": factor}),
        "activation_func": _name("torch.nn.functional.silu"),
        "make_vocab_size_divisible_by": 1,
        "should_pad_vocab": False,
    }
    common = _training(optimizer)
    name = f"iter_{common['iteration']:07d}"

    def write(folder: Path, dtype: torch.dtype) -> None:
        (folder / LATEST_FILE).write_text(str(common["iteration"]), encoding="utf-8")
        state = _TRAIN_STATE | {"step": torch.tensor(common["iteration"], dtype=torch.int32)}
        torch.save(state, folder / "latest_train_state.pt")
        torch.save(state, folder / name / "train_state.pt")
        precision = _precision(dtype) | {"params_dtype": _name(str(dtype))}
        run_config = {"_target_": _BRIDGE_CONFIG, "model": model | precision}
        text = yaml.safe_dump(run_config, sort_keys=False)
        (folder / name / RUN_CONFIG).write_text(text, encoding="utf-8")

    return Beside(name, f"{name}/tokenizer", "", common, False, write)


def _nemo(architecture: Architecture, source: str, has_tokenizer: bool) -> Beside:
    common = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {},
        "content_metadata": dict(_CONTENT),
    }
    # NeMo's own importer stores a tied Qwen2's output layer, without which its exporter fails.
    provider = provider_fields(architecture, source)
    copies = architecture.tied_embeddings and architecture.family == "qwen2"
    fields = provider | {
        "share_embeddings_and_output_weights": architecture.tied_embeddings and not copies,
        "make_vocab_size_divisible_by": 1,
    }

    def write(folder: Path, dtype: torch.dtype) -> None:
        settings = fields | _precision(dtype)
        write_context(folder / NEMO_CONTEXT, architecture, settings, dtype, has_tokenizer=has_tokenizer)

    return Beside(NEMO_WEIGHTS, f"{NEMO_CONTEXT}/nemo_tokenizer", "module.", common, copies, write)


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


def _name(target: str) -> dict[str, Any]:
    """How Bridge's YAML names an object of Python's."""
    return {"_target_": target, "_call_": False}
