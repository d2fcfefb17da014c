"""Tables in terminals of any width: nothing is cut, whatever the numbers."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import NumberTable, show_keys, show_plan
from megatron_rlt.config.loading import load_config

_ROOT = Path(__file__).parents[2]
ROWS = [
    ("student", "0", "-1,000,000,000,000", "4.77e-300"),
    ("mean [T] of a long name of words", "999,999,999", "-2.35e-16", "0"),
    ("", "1", "9.35e+02", "1,234,567"),
]


def printed(item: object, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(item)
    return output.getvalue()


def test_every_number_is_whole_in_a_terminal_of_any_width() -> None:
    table = NumberTable("numbers", ("row", "first", "second", "third"))
    for row in ROWS:
        table.add_line(*row)
    for width in range(30, 121):
        text = printed(table, width)
        assert "…" not in text
        assert max(len(line) for line in text.splitlines()) <= width
        assert re.findall(r"[-+\d.,e]*\d[-+\d.,e]*", text) == [cell for row in ROWS for cell in row[1:]]


def test_a_table_that_fits_is_a_table_and_a_narrow_one_a_list() -> None:
    table = NumberTable("Sizes", ("model", "layout", "weights"), text_columns=2)
    table.add_line("teacher", "tp 2 x pp 1", "14.2 GiB")
    wide, narrow = (
        [line.rstrip() for line in printed(table, width).splitlines() if "━" not in line] for width in (40, 25)
    )
    assert wide == ["Sizes", "model   ┃ layout      ┃  weights", "teacher │ tp 2 x pp 1 │ 14.2 GiB"]
    assert narrow == ["Sizes", "teacher", "  layout   tp 2 x pp 1", "  weights  14.2 GiB"]


@pytest.mark.parametrize("command", COMMANDS)
def test_keys_are_readable_in_80_columns(command: str) -> None:
    output = io.StringIO()
    show_keys(COMMANDS[command].config_class, Console(file=output, width=80))
    assert "…" not in output.getvalue()


def test_a_plan_is_whole_in_80_columns(workplace: Path) -> None:
    shape = Architecture.from_folder(workplace / "teacher")
    overrides = ["world_size=64", "teacher.layout={tp: 2, pp: 4, cp: 2, sp: true}", "grpo.group_size=4096"]
    config = load_config(TrainConfig, workplace / "train.yaml", overrides)
    plan, output = config.plan({"teacher": shape, "student": shape}), io.StringIO()
    show_plan(plan, Console(file=output, width=80))
    text = output.getvalue()
    assert "…" not in text
    assert "tp 2 x pp 4 x cp 2 x dp 4, sp" in text
    for model in plan.models:
        assert f"{model.num_parameters:,}" in text
    assert all(f"{value:,}" in text for _, value in plan.numbers)


def test_all_tables_are_made_this_way() -> None:
    files = [file for folder in ("megatron_rlt", "tools") for file in (_ROOT / folder).rglob("*.py")]
    others = [file.name for file in files if re.search(r"import .*\bTable\b", file.read_text())]
    assert others == ["display.py"]


def test_keys_are_shown_as_yaml_writes_them_with_the_words_that_they_may_be() -> None:
    output = io.StringIO()
    show_keys(TrainConfig, Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    assert {
        'prompts.custom_tags.separator: "\\n\\n"',
        'rollout.vllm.server.devices: [""]',
        'checkpoint.export: ["hf"]  (hf | megatron | nemo | bridge)',
        "optimizer.schedule: constant  (constant | cosine | linear)",
        "optimizer.lr: 1e-06",
        "reward.noise_floor: null",
    } <= set(lines)
