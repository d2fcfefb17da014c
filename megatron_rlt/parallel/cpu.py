"""Makes Megatron-core run on CPU ranks; installed once at start-up, and only where no accelerator exists.

Megatron-core 0.16 names CUDA in three ways: queries (`torch.cuda.current_device()`), literals
(`torch.zeros(..., device="cuda")`) and type strings (`param.type() == "torch.cuda.FloatTensor"`). Queries are
answered here for the CPU. Literals are translated only inside the few Megatron modules that write them, by
giving those modules a view of `torch` whose constructors translate the device: nothing is intercepted on the
path of every torch call. Nothing of this file is active on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Modules that construct tensors with a literal "cuda" device on paths we run (megatron-core 0.16.1).
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
    """Install the CPU answers; a second call changes nothing.

    Raises:
        RuntimeError: an accelerator exists, so hiding it would be a mistake.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform must not be installed where an accelerator exists")
    if isinstance(torch.Tensor.type, types.FunctionType):
        return
    _answer_cuda_queries()
    _answer_tensor_queries()
    with _without_compiler():
        _answer_rng_queries()
        for name in _MODULES_WITH_CUDA_LITERALS:
            importlib.import_module(name).torch = _TorchOnCpu()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Import Megatron without torch's compiler, which its decorators ask for while they are imported.

    Loading it is a fifth of a rank's start, and its functions would want a C++ compiler when they are called.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


class _TorchOnCpu(types.ModuleType):
    """`torch` as a Megatron module sees it: constructors asked for a CUDA device give a CPU tensor."""

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
    """A CUDA stream or event where work is done when the call returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _no_stream_context(_: object) -> Iterator[None]:
    yield


def _answer_cuda_queries() -> None:
    def nothing(*_: object, **__: object) -> None: ...

    answers: dict[str, object] = {
        "current_device": lambda: _CPU,
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": _no_stream_context,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _answer_tensor_queries() -> None:
    type_of = torch.Tensor.type

    def type_as_on_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - torch's own signature
        answer = type_of(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    def stay(tensor: Any, *_: object, **__: object) -> Any:  # noqa: ANN401 - tensor or module, returned as given
        return tensor

    torch.Tensor.type = type_as_on_cuda  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = stay  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[assignment, method-assign]


def _answer_rng_queries() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(*_: object, **__: object) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *_: object, **__: object) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = set_state  # type: ignore[attr-defined]
