"""NeMo 2.7.3 itself, run in an environment of its own: imports, loads and exports folders, on a CPU.

    python tests/nemo/oracle.py context FOLDER          prints what `load_context` builds, as JSON
    python tests/nemo/oracle.py export FOLDER TARGET    NeMo's `llm.export_ckpt` to Hugging Face
    python tests/nemo/oracle.py import HF TARGET        NeMo's `llm.import_ckpt` from Hugging Face

It is not stock NeMo: the patches below let it run without CUDA, Transformer Engine and tensorstore. `context` needs
only that of the fusions. This file imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import on_cpu

_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def context(folder: str) -> None:
    on_cpu.switch_off_gpu_fusions()
    from nemo.lightning import io

    whole = io.load_context(Path(folder))
    model = io.load_context(Path(folder), subpath="model")
    assert type(whole.model) is type(model)
    fields = vars(model.config)
    plain = {name: value for name, value in fields.items() if isinstance(value, bool | int | float | str | None)}
    names = {"class": type(model).__name__, "config_class": type(model.config).__name__}
    tokenizer = None if model.tokenizer is None else model.tokenizer.tokenizer.encode("3 + 4 = 7")
    print(json.dumps(plain | names | {"params_dtype": str(model.config.params_dtype), "tokenizer_ids": tokenizer}))


def export(folder: str, target: str) -> None:
    _run_on_cpu()
    _rename_norms()
    from nemo.collections import llm

    llm.export_ckpt(Path(folder), "hf", output_path=Path(target))


def import_(hf_folder: str, target: str) -> None:
    _run_on_cpu()
    _rename_norms()
    from nemo.collections import llm

    model_type = json.loads((Path(hf_folder) / "config.json").read_text())["model_type"]
    classes = {"llama": llm.LlamaModel, "qwen2": llm.Qwen2Model, "qwen3": llm.Qwen3Model}
    # Any size: the importer puts the folder's own configuration in its place.
    configs = {"llama": llm.Llama32Config1B, "qwen2": llm.Qwen2Config500M, "qwen3": llm.Qwen3Config600M}
    model = classes[model_type](configs[model_type]())
    llm.import_ckpt(model, f"hf://{Path(hf_folder).absolute()}", output_path=Path(target).absolute())


def _run_on_cpu() -> None:
    """Answer NeMo's calls of CUDA, give it the module that megatron-core 0.16 dropped, switch off fusions of a GPU."""
    on_cpu.answer_cuda_calls()
    tensorstore: Any = types.ModuleType("megatron.core.dist_checkpointing.strategies.tensorstore")
    tensorstore.TensorStoreLoadShardedStrategy = type("TensorStoreLoadShardedStrategy", (), {})
    sys.modules[tensorstore.__name__] = tensorstore
    on_cpu.switch_off_gpu_fusions()
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda state, *_: state


def _rename_norms() -> None:
    """NeMo's connectors name Transformer Engine's norms; without it Megatron's layers have norms of their own."""
    from nemo.lightning.io import state

    apply = state.apply_transforms

    def with_own_norms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **named: Any) -> Any:
        def renamed(name: str) -> str:
            for te, local in _NORMS.items():
                name = name.replace(te, local)
            return name

        return apply(source, target, {renamed(k): renamed(v) for k, v in mapping.items()}, *args, **named)

    state.apply_transforms = with_own_norms
    from nemo.lightning import io

    io.apply_transforms = with_own_norms


if __name__ == "__main__":
    {"context": context, "export": export, "import": import_}[sys.argv[1]](*sys.argv[2:])
