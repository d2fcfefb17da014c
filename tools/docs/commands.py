"""Write the reference of all commands from what the command line says about itself.

    python -m tools.docs.commands                 writes docs/reference/commands.md

A test keeps the page in step.
"""

from __future__ import annotations

from typing import Any

import typer.main

from megatron_rlt.cli import app
from tools.docs.page import PAGES, cell, write_page

PAGE = PAGES / "reference" / "commands.md"
_INTRODUCTION = """\
# Commands

{help}

Every command has `--help`. Its keys stand in the [configuration reference](configuration.md). What the exit statuses
mean is told in [resuming and signals](../how-to/resuming.md).

<!-- Written by `python -m tools.docs.commands`; change megatron_rlt/cli.py, not this page. -->
"""
_HEADER = "| argument | meaning |\n|---|---|\n"


def commands_page() -> str:
    """The page's Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [_INTRODUCTION.format(help=" ".join(group.help.split()))]
    for name, command in group.commands.items():
        usage = " ".join(_placeholder(parameter) for parameter in command.params)
        rows = "".join(f"| `{_name(parameter)}` | {cell(parameter.help)} |\n" for parameter in command.params)
        sentence = " ".join(command.help.split())
        parts.append(f"## {name}\n\n{sentence}\n\n```text\nmegatron-rlt {name} {usage}\n```\n\n{_HEADER}{rows}")
    return "\n".join(parts)


def _name(parameter: Any) -> str:  # noqa: ANN401 - typer's own, untyped here
    return str(parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0])


def _placeholder(parameter: Any) -> str:  # noqa: ANN401
    return _name(parameter) if parameter.param_type_name == "argument" else f"[{_name(parameter)}]"


if __name__ == "__main__":
    write_page(PAGE, commands_page())
