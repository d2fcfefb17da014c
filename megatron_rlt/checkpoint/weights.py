"""The trained weights of a training checkpoint alone, for jobs that ask a model and do not train it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.transformer import MegatronModule

from megatron_rlt.checkpoint.manifest import Manifest, find_fault
from megatron_rlt.checkpoint.sharded import load_model
from megatron_rlt.checkpoint.training_state import POLICY
from megatron_rlt.parallel.layout import Layout

_DIGITS = 16  # of a hash that a person may have to read: 64 bits


def load_trained_weights(model: MegatronModule, checkpoint: Path, layout: Layout) -> None:
    """Overwrite a model's weights with those that a run trained, saved in any layout. Collective on the whole job.

    Args:
        checkpoint: a folder `step-N`; its files are checked against their hashes, each rank a share.

    Raises:
        ValueError: a file is missing or altered, or the weights are those of another architecture.
    """
    manifest = Manifest.read(checkpoint)
    names = sorted(name for name in manifest.files if name.startswith(f"models/{POLICY}/"))
    mine = {name: manifest.files[name] for name in names[dist.get_rank() :: dist.get_world_size()]}
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, find_fault(checkpoint, mine))
    fault = next((fault for fault in faults if fault is not None), None)
    if fault is not None:
        raise ValueError(f"a checkpoint must be as it was saved; {fault}: take an intact one")
    try:
        load_model(model, checkpoint / "models" / POLICY, layout)
    except CheckpointingException as error:
        raise ValueError(
            f"{checkpoint} holds the weights of another architecture; name the model that its run began with: {error}"
        ) from error


def trained_weights_fingerprint(checkpoint: Path) -> str:
    """16 hexadecimal digits for the trained weights, by the manifest. Raises ValueError without a readable one."""
    return Manifest.read(checkpoint).tensors_sha256(f"models/{POLICY}")[:_DIGITS]
