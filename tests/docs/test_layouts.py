"""The numbers on the page about layouts are those that a dry run prints today."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import show_plan
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.models import layout_faults
from tests.config.model_folders import model_folder
from tests.docs.pages import ROOT, blocks

PAGE = "how-to/layouts.md"
CONFIG = ROOT / "configs" / "rlt_qwen2.5-7b_1x8_tp2sp_tp2.yaml"
# As published: Qwen2.5-7B-Instruct's config.json.
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}


@pytest.fixture
def shape(tmp_path: Path) -> Architecture:
    return Architecture.from_folder(model_folder(tmp_path / "qwen", **QWEN_7B))


def test_the_shown_plan_is_the_one_that_a_dry_run_prints(shape: Architecture) -> None:
    config = load_config(TrainConfig, CONFIG, [])
    output = io.StringIO()
    show_plan(config.plan({"teacher": shape, "student": shape}), Console(file=output, width=120))
    printed = "\n".join(line.rstrip() for line in output.getvalue().splitlines())
    shown = [block.text.rstrip() for block in blocks(PAGE, "text")]
    assert printed.strip() in shown


def test_the_shown_mistake_is_the_line_that_is_printed(shape: Architecture) -> None:
    config = load_config(TrainConfig, CONFIG, ["world_size=6", "teacher.layout.tp=3"])
    faults = layout_faults({"teacher": config.teacher, "student": config.student}, {"teacher": shape}, 6)
    shown = [block.text.strip() for block in blocks(PAGE, "text")]
    assert [f"megatron-rlt: error: {fault}" for fault in faults] == shown[:1]
