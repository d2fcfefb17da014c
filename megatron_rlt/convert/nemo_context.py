"""Writes NeMo 2.0's `context/`: io.json, from which NeMo rebuilds its objects, and model.yaml, which people read.

io.json is fiddle's JSON. Every object gives its class, the arguments it is built with, and its path from the root, by
which NeMo finds a part such as the model alone. Neither NeMo nor fiddle is needed to write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.provider import llama31_fields

TOKENIZER = "nemo_tokenizer"
_MODELS = "nemo.collections.llm.gpt.model"
_CLASSES = {  # family -> module, configuration, model
    "llama": ("llama", "LlamaConfig", "LlamaModel"),
    "qwen2": ("qwen2", "Qwen2Config", "Qwen2Model"),
    "qwen3": ("qwen3", "Qwen3Config", "Qwen3Model"),
}
_TOKENIZER_CLASS = ("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")
_STRATEGY = ("nemo.lightning.pytorch.strategies.megatron_strategy", "MegatronStrategy")
_BUILDABLE = {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"}


def write_context(
    folder: Path, architecture: Architecture, fields: dict[str, Any], dtype: torch.dtype, *, has_tokenizer: bool
) -> None:
    """Write the folder.

    Args:
        fields: of NeMo's model configuration, without RoPE scaling of Llama 3.
        has_tokenizer: whether a tokenizer's files stand in `nemo_tokenizer` beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module, config, model = _CLASSES[architecture.family]
    scaling = llama31_fields(architecture)
    config = config if scaling is None else "Llama31Config"
    fields = fields | (scaling or {})
    objects = _Objects()
    settings = objects.config((f"{_MODELS}.{module}", config), "model.config", fields | {"params_dtype": dtype})
    parts: dict[str, Any] = {"config": settings}
    if has_tokenizer:
        parts["tokenizer"] = objects.config(_TOKENIZER_CLASS, "model.tokenizer", {"pretrained_model_name": TOKENIZER})
    # "cpu" is what NeMo's own importer writes; its exporters build the trainer, which "gpu" forbids without one.
    strategy = objects.config(_STRATEGY, "trainer.strategy", {"ddp": "pytorch", "setup_optimizers": False})
    trainer = {"accelerator": "cpu", "strategy": strategy, "devices": 1}
    context = {
        "model": objects.config((f"{_MODELS}.{module}", model), "model", parts),
        "trainer": objects.config(("nemo.lightning.pytorch.trainer", "Trainer"), "trainer", trainer),
        "extra": objects.collection("dict", [], path="extra"),
    }
    root = objects.config(("nemo.lightning.io.pl", "TrainerContext"), "", context)
    document = {"root": root, "objects": objects.by_key, "refcounts": dict.fromkeys(objects.by_key, 1)}
    text = json.dumps(document | {"version": "0.0.1"})
    (folder / "io.json").write_text(text, encoding="utf-8")
    _name_tokenizer_class(folder / TOKENIZER / "tokenizer_config.json")
    _write_yaml(folder / "model.yaml", f"{_MODELS}.{module}", (config, model), fields, dtype, has_tokenizer)


def _name_tokenizer_class(file: Path) -> None:
    """Name the class that transformers 4 knows too, with which NeMo runs; transformers 5 has another name for it."""
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Objects:
    """The objects of one io.json; every method adds one and returns a reference to it."""

    def __init__(self) -> None:
        self.by_key: dict[str, Any] = {}

    def config(self, target: tuple[str, str], path: str, arguments: dict[str, Any]) -> dict[str, str]:
        """A fiddle.Config: a class, and the arguments to build it with."""
        names = self.collection("tuple", [(f"Index(index={i})", name) for i, name in enumerate(arguments)])
        metadata = self._add(
            _BUILDABLE,
            [
                ("Attr(name='fn_or_cls')", _reference(*target)),
                ("Attr(name='argument_names')", names),
                ("Attr(name='argument_tags')", self.collection("dict", [])),
                ("Attr(name='argument_history')", self.collection("dict", [])),
            ],
            metadata=dict(_BUILDABLE),
        )
        items = [(f"Attr(name='{name}')", _value(value, path, name)) for name, value in arguments.items()]
        return self._add(_reference("fiddle._src.config", "Config"), items, metadata=metadata, path=path)

    def collection(self, kind: str, items: list[tuple[str, Any]], *, path: str | None = None) -> dict[str, str]:
        """A tuple or a dictionary."""
        empty: dict[str, Any] = {"type": _reference("builtins", "tuple"), "items": [], "metadata": None}
        return self._add(_reference("builtins", kind), items, metadata=empty if kind == "dict" else None, path=path)

    def _add(
        self,
        kind: dict[str, str],
        items: list[tuple[str, Any]],
        *,
        metadata: dict[str, Any] | None,
        path: str | None = None,
    ) -> dict[str, str]:
        key = f"object_{len(self.by_key) + 1}"
        node: dict[str, Any] = {"type": dict(kind), "items": [list(item) for item in items], "metadata": metadata}
        if path is not None:
            node["paths"] = [_path(path)]
        self.by_key[key] = node
        return {"type": "ref", "key": key}


def _value(value: Any, path: str, name: str) -> dict[str, Any]:  # noqa: ANN401 - a plain value or a reference
    if isinstance(value, dict):
        return value
    paths = [_path(f"{path}.{name}" if path else name)]
    if isinstance(value, torch.dtype):
        return {**_reference("torch", str(value).removeprefix("torch.")), "paths": paths}
    return {"type": "leaf", "value": value, "paths": paths}


def _path(path: str) -> str:
    return f"<root>.{path}" if path else "<root>"


def _reference(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}


def _write_yaml(
    file: Path, module: str, names: tuple[str, str], fields: dict[str, Any], dtype: torch.dtype, has_tokenizer: bool
) -> None:
    config, model = names
    tokenizer = {"_target_": ".".join(_TOKENIZER_CLASS), "pretrained_model_name": TOKENIZER}
    content = {
        "_target_": f"{module}.{model}",
        "config": {
            "_target_": f"{module}.{config}",
            **fields,
            "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
            "params_dtype": {"_target_": str(dtype), "_call_": False},
        },
        "tokenizer": tokenizer if has_tokenizer else None,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
