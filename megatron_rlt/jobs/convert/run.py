"""`megatron-rlt convert`: streams a model from one kind of folder to another, compares every tensor, certifies it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.convert import ConvertConfig
from megatron_rlt.config.folders.description import ModelDescription, describe_model
from megatron_rlt.config.folders.optimizer_state import OptimizerState, find_optimizer_state
from megatron_rlt.convert.census import Census, census_faults, counted, file_hashes
from megatron_rlt.convert.targets import Model, Optimizer, write_model
from megatron_rlt.convert.whole_folder import whole_folder
from megatron_rlt.jobs.convert.progress import Progress
from megatron_rlt.models.weights.sources import WeightSource, open_optimizer, open_weights
from megatron_rlt.models.weights.table import hf_shapes
from megatron_rlt.parallel.platform import install_platform
from megatron_rlt.types import StoppedError
from megatron_rlt.whole_files import write_text

if TYPE_CHECKING:
    from megatron_rlt.jobs.convert.certificate import Comparison

CERTIFICATE = "conversion.json"
_PACKAGES = ("megatron-rlt", "megatron-core", "torch", "transformers", "safetensors")
_WEIGHTS = "weights"  # beside the kinds of optimizer state


def run_convert(config: ConvertConfig) -> int:
    """Convert; returns the exit status.

    Raises:
        ValueError: the source is damaged or does not fit its description, the target's kind cannot express it, or the
            disk refuses. Nothing is left behind.
    """
    try:
        convert(config)
    except StoppedError as stopped:
        sys.stderr.write(f"megatron-rlt: error: {stopped}\n")
        return 1
    return 0


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert; returns the certificate. Raises also StoppedError where the target is not what the source was."""
    described = describe_model(config.source, config=config.config, tokenizer=config.tokenizer_folder)
    print(f"{config.source}: {described.found.what} ({described.found.kind}) -> {config.target} ({config.target_kind})")
    optimizer = find_optimizer_state(described) if config.optimizer else None
    sources = _opened(described, optimizer)
    before: dict[str, Census] = {part: {} for part in sources}
    with whole_folder(config.target) as partial:
        _write(partial, sources, before, Model.of(described), optimizer, config)
        written = describe_model(partial)
        _check_architecture(described.architecture, written)
        targets = _opened(written, find_optimizer_state(written) if config.optimizer else None)
        _check_census(before, targets, config)
        compared = None
        if config.certify == "logprobs":
            compared = _compare(described, written, config)
            compared.check(config.target)
        certificate = _certificate(config, described, written, (sources[_WEIGHTS], targets[_WEIGHTS]), before, compared)
        write_text(partial / CERTIFICATE, json.dumps(certificate, indent=1))
    print(_summary(before, compared))
    return certificate


def _opened(described: ModelDescription, optimizer: OptimizerState | None) -> dict[str, WeightSource]:
    """The weights and each kind of optimizer state, by name."""
    moments = {} if optimizer is None else open_optimizer(described, optimizer)
    return {_WEIGHTS: open_weights(described), **moments}


def _write(
    folder: Path,
    sources: dict[str, WeightSource],
    before: dict[str, Census],
    model: Model,
    optimizer: OptimizerState | None,
    config: ConvertConfig,
) -> None:
    progress = Progress(sum(len(hf_shapes(source.architecture)) for source in sources.values()))
    streams = {
        part: counted(
            progress.shown(source.tensors(workers=config.workers), config.dtype if part == _WEIGHTS else None),
            before[part],
        )
        for part, source in sources.items()
    }
    weights = streams.pop(_WEIGHTS)
    state = None if optimizer is None else Optimizer(optimizer, streams)
    write_model(config.target_kind, folder, weights, model, max_shard_bytes=config.max_shard_bytes, optimizer=state)


def _check_architecture(source: Architecture, written: ModelDescription) -> None:
    if written.architecture != source:
        changed = {
            key: (value, asdict(written.architecture)[key])
            for key, value in asdict(source).items()
            if asdict(written.architecture)[key] != value
        }
        raise StoppedError(f"the target describes another model than the source (source, target): {changed}")


def _check_census(before: dict[str, Census], targets: dict[str, WeightSource], config: ConvertConfig) -> None:
    for part, target in targets.items():
        after: Census = {}
        for _ in counted(target.tensors(workers=config.workers), after):
            pass
        if faults := census_faults(before[part], after):
            raise StoppedError(f"{config.target}: not written: {part} read back, {'; '.join(faults[:5])}")


def _compare(source: ModelDescription, target: ModelDescription, config: ConvertConfig) -> Comparison:
    install_platform()  # before the certificate imports Megatron, which nothing else of a conversion does
    from megatron_rlt.jobs.convert.certificate import compare

    return compare(source, target, rounded_to=getattr(torch, config.dtype or "float32"))


def _certificate(
    config: ConvertConfig,
    described: ModelDescription,
    written: ModelDescription,
    sources: tuple[WeightSource, WeightSource],
    before: dict[str, Census],
    compared: Comparison | None,
) -> dict[str, Any]:
    source, target = (one.stored_names for one in sources)
    return {
        "source": {
            "folder": str(config.source),
            "kind": described.found.kind,
            "what": described.found.what,
            "files": file_hashes(described.found.weights),
        },
        "target": {"kind": written.found.kind},
        "architecture": asdict(described.architecture),
        "dtype": config.dtype or "as stored",
        "versions": {package: version(package) for package in _PACKAGES},
        "tensors": {
            name: {**asdict(record), "source": source[name], "target": target[name]}
            for name, record in before[_WEIGHTS].items()
        },
        "optimizer": {
            part: {name: asdict(record) for name, record in census.items()}
            for part, census in before.items()
            if part != _WEIGHTS
        },
        "logprobs": None if compared is None else {**asdict(compared), "max_difference": compared.max_difference},
    }


def _summary(before: dict[str, Census], compared: Comparison | None) -> str:
    proof = "log-probs were not compared (--certify none)"
    if compared is not None:
        left, right = compared.readers
        proof = f"log-probs of 8 fixed prompts differ by at most {compared.max_difference:.2g} ({left}, {right})"
    return f"{sum(map(len, before.values()))} tensors are equal bit by bit; {proof}"
