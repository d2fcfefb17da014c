"""`megatron-rlt convert`: streams a model from one kind of folder to another, compares every tensor, certifies it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.convert import ConvertConfig
from megatron_rlt.config.folders.description import ModelDescription, describe_model
from megatron_rlt.convert.census import Census, census_faults, counted, file_hashes
from megatron_rlt.convert.targets import Model, write_model
from megatron_rlt.convert.whole_folder import whole_folder
from megatron_rlt.models.weights.sources import WeightSource, open_weights
from megatron_rlt.models.weights.table import hf_shapes
from megatron_rlt.parallel.platform import install_platform
from megatron_rlt.types import StoppedError
from megatron_rlt.whole_files import write_text

if TYPE_CHECKING:
    from megatron_rlt.jobs.convert.certificate import Comparison

CERTIFICATE = "conversion.json"
_PACKAGES = ("megatron-rlt", "megatron-core", "torch", "transformers", "safetensors")
_SECONDS_BETWEEN_LINES = 5.0


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
    source = open_weights(described)
    before: Census = {}
    with whole_folder(config.target) as partial:
        stream = counted(_shown(source, config), before)
        model = Model.of(described)
        write_model(config.target_kind, partial, stream, model, max_shard_bytes=config.max_shard_bytes)
        written = describe_model(partial)
        _check_architecture(described.architecture, written)
        target = open_weights(written)
        _check_census(before, target, config)
        compared = None
        if config.certify == "logprobs":
            compared = _compare(described, written, config)
            compared.check(config.target)
        certificate = _certificate(config, described, written, (source, target), before, compared)
        write_text(partial / CERTIFICATE, json.dumps(certificate, indent=1))
    print(_summary(before, compared))
    return certificate


def _shown(source: WeightSource, config: ConvertConfig) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors in the wanted dtype; says from time to time how far it is."""
    total = len(hf_shapes(source.architecture))
    begun = last = time.monotonic()
    num_bytes = 0
    for number, (name, tensor) in enumerate(source.tensors(workers=config.workers), start=1):
        wanted = tensor if config.dtype is None else tensor.to(getattr(torch, config.dtype))
        yield name, wanted
        num_bytes += wanted.nbytes
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last, rate = now, num_bytes / (now - begun)
            left = (now - begun) * (total - number) / number
            print(f"{number} of {total} tensors, {rate / 1e6:,.0f} MB/s, about {left:.0f} s left", flush=True)


def _check_architecture(source: Architecture, written: ModelDescription) -> None:
    if written.architecture != source:
        changed = {
            key: (value, asdict(written.architecture)[key])
            for key, value in asdict(source).items()
            if asdict(written.architecture)[key] != value
        }
        raise StoppedError(f"the target describes another model than the source (source, target): {changed}")


def _check_census(before: Census, target: WeightSource, config: ConvertConfig) -> None:
    after: Census = {}
    for _ in counted(target.tensors(workers=config.workers), after):
        pass
    if faults := census_faults(before, after):
        raise StoppedError(f"{config.target}: not written: read back, {'; '.join(faults[:5])}")


def _compare(source: ModelDescription, target: ModelDescription, config: ConvertConfig) -> Comparison:
    install_platform()  # before the certificate imports Megatron, which nothing else of a conversion does
    from megatron_rlt.jobs.convert.certificate import compare

    return compare(source, target, rounded_to=getattr(torch, config.dtype or "float32"))


def _certificate(
    config: ConvertConfig,
    described: ModelDescription,
    written: ModelDescription,
    sources: tuple[WeightSource, WeightSource],
    census: Census,
    compared: Comparison | None,
) -> dict[str, Any]:
    source, target = sources
    names = {name: [source.stored_names[name], target.stored_names[name]] for name in census}
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
            name: {**asdict(record), "source": names[name][0], "target": names[name][1]}
            for name, record in census.items()
        },
        "logprobs": None if compared is None else {**asdict(compared), "max_difference": compared.max_difference},
    }


def _summary(census: Census, compared: Comparison | None) -> str:
    proof = "log-probs were not compared (--certify none)"
    if compared is not None:
        left, right = compared.readers
        proof = f"log-probs of 8 fixed prompts differ by at most {compared.max_difference:.2g} ({left}, {right})"
    return f"{len(census)} tensors are equal bit by bit; {proof}"
