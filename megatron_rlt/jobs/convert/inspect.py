"""`megatron-rlt inspect`: one screen about a model folder; reads names and headers, no weights."""

from __future__ import annotations

import math
from collections import Counter

from rich.console import Console

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.convert import InspectConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.folders.description import ModelDescription, describe_model
from megatron_rlt.config.folders.kind import CHECKPOINT_MANIFEST, WRITTEN
from megatron_rlt.config.folders.optimizer_state import HOLDERS, find_optimizer_state
from megatron_rlt.config.folders.provider import export_fault
from megatron_rlt.models.weights.hf_reader import read_headers
from megatron_rlt.models.weights.sources import open_weights
from megatron_rlt.models.weights.table import hf_shapes

_SPLIT_BY_ROWS = "self_attention.linear_proj.weight"  # tensor parallelism cuts its last dimension


def run_inspect(config: InspectConfig) -> int:
    """Print the screen. Raises ValueError if the weights do not fit what the folder says of the model."""
    described = describe_model(config.source, config=config.config)
    open_weights(described)  # the census
    table = NumberTable(f"{config.source}", ("", ""), text_columns=2)
    for name, value in lines(described):
        table.add_line(name, value)
    Console().print(table)
    return 0


def lines(described: ModelDescription) -> list[tuple[str, str]]:
    """Names and values of the screen."""
    architecture, tokenizer = described.architecture, described.tokenizer
    found = described.found
    # A run's checkpoint has Megatron's tensors, but is no folder that Megatron-LM reads.
    same = None if (found.folder / CHECKPOINT_MANIFEST).is_file() else found.kind
    made = [kind for kind in WRITTEN if kind is not same and export_fault(architecture, kind) is None]
    return [
        ("kind", f"{found.what} ({found.kind})"),
        ("architecture", _family(architecture)),
        ("parameters", f"{sum(math.prod(shape) for shape in hf_shapes(architecture).values()):,}"),
        ("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in _dtypes(described).items())),
        ("saved in", _layout(described)),
        ("optimizer", _optimizer(described)),
        ("tokenizer", "none: convert asks for --tokenizer FOLDER" if tokenizer is None else str(tokenizer)),
        ("can become", ", ".join(f"--to {kind}" for kind in made)),
    ]


def _family(architecture: Architecture) -> str:
    scaling = architecture.rope_scaling
    return (
        f"{architecture.family}, {architecture.num_layers} layers, hidden {architecture.hidden_size}, "
        f"{architecture.num_heads} heads of {architecture.head_dim} ({architecture.num_kv_heads} key-value), ffn "
        f"{architecture.ffn_size}, vocabulary {architecture.vocab_size:,}, "
        f"{'tied' if architecture.tied_embeddings else 'untied'}, {architecture.max_positions:,} positions, RoPE "
        f"{architecture.rope_theta:g}{'' if scaling is None else ' ' + scaling['rope_type']}"
    )


def _optimizer(described: ModelDescription) -> str:
    """Whether `convert --optimizer` finds what it needs."""
    if described.found.kind not in HOLDERS:
        return "none that convert takes along"
    try:
        state = find_optimizer_state(described)
    except ValueError as fault:
        return f"not to be taken along: {fault}"
    return f"Adam's state after iteration {state.iteration}: convert --optimizer takes it along"


def _dtypes(described: ModelDescription) -> Counter[str]:
    if described.tensors is None:
        return Counter(one.dtype for one in read_headers(described.found.weights).values())
    return Counter(one.dtype for one in described.tensors.tensors.values())


def _layout(described: ModelDescription) -> str:
    """The layout of the save, as the cuts of the tensors tell it."""
    if described.tensors is None:
        return f"{len({one.file for one in read_headers(described.found.weights).values()})} safetensors files"
    files = {chunk.file.name for one in described.tensors.tensors.values() for chunk in one.chunks}
    ranks = {name.split("_")[2] for name in files}
    cut = [one for name, one in described.tensors.tensors.items() if name.endswith(_SPLIT_BY_ROWS)]
    tp = max((len({chunk.offsets[-1] for chunk in one.chunks}) for one in cut), default=1)
    return f"{len(files)} files written by {len(ranks)} ranks, tensor-parallel {tp}"
