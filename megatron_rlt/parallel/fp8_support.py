"""Whether this rank's device can run a job's FP8 models, asked before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from megatron_rlt.config.fp8 import hardware_fault
from megatron_rlt.config.models import ModelConfig, block_scales
from megatron_rlt.given_files import FaultsError
from megatron_rlt.parallel.environment import set_block_scales


def prepare_fp8(models: Mapping[str, ModelConfig]) -> None:
    """Set Transformer Engine's environment for a job's models; call before Megatron is imported.

    Raises:
        ValueError: a GPU, its CUDA version or the installation lacks what an FP8 model needs, one line each.
    """
    scales = block_scales(models)
    if scales is not None:
        set_block_scales(float32=scales == "float32")
    if not torch.cuda.is_available():
        return
    assert torch.version.cuda is not None, "an NVIDIA GPU is there"
    major, minor = torch.version.cuda.split(".")[:2]
    faults = []
    for name, model in models.items():
        if model.fp8 is None:
            continue
        fault = hardware_fault(model.fp8, torch.cuda.get_device_capability(), (int(major), int(minor)))
        if fault is not None:
            faults.append(f"{name}.fp8.{fault}")
        if find_spec("transformer_engine") is None:
            faults.append(f"{name}.fp8: needs Transformer Engine on a GPU; install it, or leave fp8 out")
    if faults:
        raise FaultsError(faults)
