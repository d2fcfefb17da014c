"""Loads only the trained weights of a training checkpoint, for jobs that do not train."""

from __future__ import annotations

from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_rlt.checkpoint.folders import check_files
from megatron_rlt.checkpoint.manifest import Manifest
from megatron_rlt.checkpoint.sharded import load_model
from megatron_rlt.checkpoint.training_state import POLICY
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.platform import world


def load_trained_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Overwrite a model's weights with those that a run trained, saved in any layout. Collective on the whole job.

    Args:
        checkpoint: a folder `step-N`; the ranks split the check of its files against their hashes.

    Raises:
        ValueError: a file is missing or altered, or the weights are those of another architecture.
    """
    _, fault = check_files(checkpoint, world(), f"models/{POLICY}/")
    if fault is not None:
        raise ValueError(f"a checkpoint must be as it was saved; {fault}: take an intact one")
    try:
        load_model(model, checkpoint / "models" / POLICY)
    except CheckpointingException as error:
        raise ValueError(
            f"{checkpoint} holds the weights of another architecture; name the model that its run began with: {error}"
        ) from error


def trained_weights_fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the trained weights from the manifest. Raises ValueError if the manifest cannot be read."""
    return Manifest.read(checkpoint).tensors_sha256(f"models/{POLICY}")
