"""The reference pages are what their generators write today, and say what the code says."""

from __future__ import annotations

import typer.main

from megatron_rlt.cli import app
from megatron_rlt.config.keys import keys_of
from tools.docs import commands, configuration
from tools.docs.page import cell


def test_the_configuration_reference_is_up_to_date() -> None:
    written = configuration.PAGE.read_text(encoding="utf-8")
    assert written == configuration.configuration_page(), "run: python -m tools.docs.configuration"


def test_the_command_reference_is_up_to_date() -> None:
    assert commands.PAGE.read_text(encoding="utf-8") == commands.commands_page(), "run: python -m tools.docs.commands"


def test_every_command_of_the_command_line_has_its_configuration() -> None:
    names = set(typer.main.get_command(app).commands)
    assert names >= {"prepare", "sft", "train", "rlvr", "score"}
    assert names - {"status", "doctor", "serve", "pipeline"} == configuration.commands().keys()  # keyless


def test_every_key_has_a_row_with_its_sentence() -> None:
    page = configuration.configuration_page()
    for config in configuration.commands().values():
        for key in keys_of(config):
            name = key.dotted.rpartition(".")[2]
            assert any(
                line.startswith(f"| `{name}` |") and line.endswith(f"| {cell(key.sentence)} |")
                for line in page.splitlines()
            ), key.dotted


def test_types_bounds_and_presets_are_shown() -> None:
    lines = configuration.configuration_page().splitlines()
    assert "| `tp` | whole number > 0 | `1` | Tensor-parallel size: ranks that share every layer. |" in lines
    assert any(line.startswith("| `top_p` | 0 &lt; number ≤ 1 | `1` |") for line in lines)
    assert any(line.startswith("| `clip_low` | number > 0 or `null` | `null` |") for line in lines)
    assert any(line.startswith("| `role` | `teacher`, `student` | `teacher` |") for line in lines)
    preset = next(line for line in lines if line.startswith("| `optimizer` |") and "cosine" in line)
    assert "`lr: 1e-05`, `schedule: cosine`" in preset
    assert "clip_grad" not in preset, "only what differs from the section's own defaults"


def test_a_cell_stays_a_cell() -> None:
    assert cell("a | b `c|d` <e>\n[f] `g`") == "a &#124; b <code>c&#124;d</code> &lt;e> &#91;f] `g`"
