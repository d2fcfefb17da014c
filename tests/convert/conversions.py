"""Conversions as a user calls them, and Megatron's own save on real ranks."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rlt.cli import main
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.parallel.layout import build_layout
from tests.models.loading import loaded_model


def converted(source: Path, target: Path, *options: str) -> Path:
    """Convert without a tokenizer; the command must end well."""
    assert main(["convert", str(source), str(target), "--tokenizer", "none", *options]) == 0
    return target


def save_as_megatron(
    hf_folder: str, target: str, layout: dict[str, int], arguments: dict[str, Any], content: dict[str, Any]
) -> None:
    """On every rank: load a model in a layout, then Megatron's own `save` as Megatron-LM calls it, with arguments."""
    # Its writer calls CUDA and starts workers, which a rank of the tests may not without these two lines.
    torch.cuda.synchronize = lambda *_: None
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    model = loaded_model(Path(hf_folder), build_layout(LayoutConfig(**layout)), torch.float32)
    folder = Path(target) / "iter_0000012"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (Path(target) / "latest_checkpointed_iteration.txt").write_text("12")
    dist.barrier()
    with model.layout:
        state = model.sharded_state_dict(metadata=dict(content))
        state |= {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 12}
        dist_checkpointing.save(state, str(folder), content_metadata=dict(content))
    dist.barrier()


def megatron_arguments(**changes: Any) -> dict[str, Any]:
    """What Megatron-LM's parser would hold for `tiny_hf_model`'s default sizes."""
    return {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 16,
        "untie_embeddings_and_output_weights": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "norm_epsilon": 1e-6,
        "rotary_base": 10000,
        "use_rope_scaling": False,
        "max_position_embeddings": 512,
        "seq_length": 256,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "num_experts": None,
        "padded_vocab_size": 132,
        "params_dtype": torch.float32,
        **changes,
    }
