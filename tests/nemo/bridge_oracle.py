"""Megatron-Bridge 0.3.1 itself, run in NeMo's environment: exports and imports folders, on a CPU.

    python tests/nemo/bridge_oracle.py export [FOLDER HF TARGET]...    `AutoBridge.export_ckpt(strict=True)` to Hugging
                                                                       Face; HF says what model it is
    python tests/nemo/bridge_oracle.py import [HF TARGET]...           what `AutoBridge.import_ckpt` does, with a layer
                                                                       spec

It is not stock Bridge: the patches below let it run without CUDA, Transformer Engine and triton. `import_ckpt` takes no
layer spec, so its three steps are called here. This file imports nothing of this project.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import on_cpu

_ABSENT = (
    *("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops"),
    *("triton", "triton.language"),
)


class _Unused:
    """Stands for a class, or a decorator, of an absent package."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Unused:
        return self


class _Absent(types.ModuleType):
    """A package that is imported for annotations, decorators and base classes, and whose parts are never run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Unused,), {})


def export(folder: str, hf_folder: str, target: str) -> None:
    bridge = _auto_bridge().from_hf_pretrained(hf_folder)
    bridge.export_ckpt(Path(folder), Path(target), show_progress=False, strict=True)


def import_(hf_folder: str, target: str) -> None:
    bridge = _auto_bridge().from_hf_pretrained(hf_folder)
    provider = bridge.to_megatron_provider(load_weights=True)
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with temporary_distributed_context(backend="gloo"):
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, Path(target), hf_tokenizer_path=hf_folder)


@cache
def _auto_bridge() -> Any:
    """Bridge's class, imported after the patches."""
    on_cpu.answer_cuda_calls()
    on_cpu.switch_off_gpu_fusions()
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 - before the absent packages: they would pass for real

    for name in _ABSENT:
        module = _Absent(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    from megatron.bridge import AutoBridge
    from megatron.bridge.models import gpt_provider

    gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec
    return AutoBridge


if __name__ == "__main__":
    work, count = {"export": (export, 3), "import": (import_, 2)}[sys.argv[1]]
    for first in range(2, len(sys.argv), count):
        work(*sys.argv[first : first + count])
