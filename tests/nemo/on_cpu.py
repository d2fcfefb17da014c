"""What NVIDIA's tools need to run without CUDA and Transformer Engine; imports nothing of this project."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_GPU_FUSIONS = (
    *("apply_rope_fusion", "persist_layer_norm", "masked_softmax_fusion"),
    *("bias_dropout_fusion", "gradient_accumulation_fusion"),
)


def answer_cuda_calls() -> None:
    """Let calls of CUDA that compute nothing return."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, _name=name: None)
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.Stream = lambda *_args, **_named: None
    cuda.stream = lambda *_: contextlib.nullcontext()


def switch_off_gpu_fusions() -> None:
    """Configurations ask for fusions, which Megatron refuses without Transformer Engine."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    def without_fusions(self: Any) -> None:
        for name in _GPU_FUSIONS:
            setattr(self, name, False)
        check(self)

    TransformerConfig.__post_init__ = without_fusions
