"""FP8 weights, Transformer Engine's or emulated: what Megatron is told, how a weight is filled, which bytes hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor  # of any recipe; nothing is where Transformer Engine is not
from torch import Tensor, nn

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.fp8_linear import EmulatedFp8Linear


def transformer_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Megatron's settings for Transformer Engine's FP8. Weights are stored in FP8 once, without a bfloat16 copy."""
    return {"fp8": "e4m3", "fp8_recipe": fp8.recipe, "fp8_param": True}


def held_tensors(module: nn.Module) -> list[Tensor]:
    """The plain tensors that hold a module's parameters and buffers, a tied parameter once.

    A quantised tensor of Transformer Engine claims to be bfloat16; its codes and scales are plain tensors inside it.
    """
    tensors = dict.fromkeys((*module.parameters(), *module.buffers()))
    return [part for tensor in tensors for part in plain_parts(tensor)]


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside a quantised tensor; a plain tensor itself."""
    if not is_float8tensor(tensor):
        return [tensor]
    # Tensors among the arguments that Transformer Engine would build an equal one from.
    return [part for part in tensor.get_metadata().values() if isinstance(part, Tensor)]  # type: ignore[attr-defined]


def weight_writer(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """The function that copies bfloat16 values into a parameter of the model, quantising where it is FP8."""
    emulated = {id(module.weight): module for module in model.modules() if isinstance(module, EmulatedFp8Linear)}

    @torch.no_grad()
    def write(parameter: Tensor, values: Tensor) -> None:
        if id(parameter) in emulated:
            emulated[id(parameter)].fill(values)
        else:
            parameter.copy_(values)  # Transformer Engine's quantised tensors quantise what is copied onto them

    return write


def is_fp8(parameter: Tensor) -> bool:
    """Whether a parameter is FP8, so that writes to slices of it are lost or rounded twice."""
    return parameter.dtype == torch.float8_e4m3fn or bool(is_float8tensor(parameter))


def quantised_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and parameter of every FP8 weight."""
    return ((name, parameter) for name, parameter in model.named_parameters() if is_fp8(parameter))
