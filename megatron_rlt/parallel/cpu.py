"""Makes Megatron-core run on CPU ranks; installed once at start-up, only without an accelerator.

Megatron-core 0.16 uses CUDA in three ways: queries (`torch.cuda.current_device()`), literals
(`torch.zeros(..., device="cuda")`) and type strings (`param.type() == "torch.cuda.FloatTensor"`). Queries and type
strings are patched in torch. Literals are translated only in the few Megatron modules that write them, which get a view
of `torch` whose constructors translate the device, so that other torch calls have no overhead.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Modules that construct tensors with a literal "cuda" device on code paths used here (megatron-core 0.16.1).
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)

_TRANSLATED_CONSTRUCTORS = ("empty", "full", "ones", "tensor", "zeros")
_CPU = torch.device("cpu")


def install_cpu_platform() -> None:
    """Install the patches; a second call changes nothing. Raises RuntimeError if there is an accelerator."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform must not be installed where an accelerator exists")
    if isinstance(torch.Tensor.type, types.FunctionType):
        return
    _patch_cuda_queries()
    _patch_tensor_queries()
    with _without_compiler():
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        random._get_cuda_rng_state = torch.cuda.get_rng_state  # type: ignore[attr-defined]
        random._set_cuda_rng_state = torch.cuda.set_rng_state  # type: ignore[attr-defined]
        for name in _MODULES_WITH_CUDA_LITERALS:
            importlib.import_module(name).torch = _TorchOnCpu()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Import Megatron without torch's compiler, which its decorators load at import.

    Loading it takes a fifth of a rank's start-up time, and compiled functions would need a C++ compiler.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


class _TorchOnCpu(types.ModuleType):
    """A view of `torch` for Megatron modules: constructors with a CUDA device return CPU tensors."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _TRANSLATED_CONSTRUCTORS:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a view of a module has its attributes' types
        return getattr(torch, name)


def _on_cpu(constructor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def construct(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the constructor's own arguments
        if "device" in kwargs:
            kwargs["device"] = _CPU
        return constructor(*args, **kwargs)

    return construct


class _NoStream:
    """A CUDA stream or event that does nothing: CPU work is done when the call returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    wait_stream = wait_event = record = synchronize = wait


def _patch_cuda_queries() -> None:
    def nothing(*_: object, **__: object) -> None: ...

    answers: dict[str, object] = {
        "current_device": lambda: _CPU,
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": lambda _: contextlib.nullcontext(),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _patch_tensor_queries() -> None:
    type_of = torch.Tensor.type

    def type_as_on_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - torch's own signature
        answer = type_of(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    def stay(tensor: Any, *_: object, **__: object) -> Any:  # noqa: ANN401 - tensor or module, returned as given
        return tensor

    torch.Tensor.type = type_as_on_cuda  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = stay  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[assignment, method-assign]
