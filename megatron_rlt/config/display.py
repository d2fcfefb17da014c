"""Configuration keys and derived numbers as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_rlt.config.keys import Key, keys_of
from megatron_rlt.config.plan import Plan
from megatron_rlt.config.sections import Section


def show_keys(config_class: type[Section], console: Console) -> None:
    """Every key of a command's configuration with its default and its sentence."""
    table = Table(title=f"Keys of {config_class.__name__}", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("key", no_wrap=True, style="bold")
    table.add_column("default")
    table.add_column("meaning")
    for key in keys_of(config_class):
        style = None if key.section is None else "cyan"
        table.add_row(key.dotted, escape(_default(key)), escape(key.sentence), style=style)
    console.print(table)


def show_plan(plan: Plan, console: Console) -> None:
    """Derived numbers, then what the fullest rank of every model holds."""
    numbers = Table(title="Derived numbers", title_justify="left", show_header=False, show_edge=False, pad_edge=False)
    numbers.add_column()
    numbers.add_column(justify="right", no_wrap=True)
    for name, value in plan.numbers:
        numbers.add_row(name, f"{value:,}")
    console.print(numbers)
    models = Table(title="\nFullest rank", title_justify="left", show_edge=False, pad_edge=False)
    models.add_column("model")
    models.add_column("layout", no_wrap=True)
    for heading in ("parameters", "of them here", "weights", "gradients", "optimizer", "sum"):
        models.add_column(heading, justify="right", no_wrap=True)
    for model in plan.models:
        sizes = (model.weight_bytes, model.gradient_bytes, model.optimizer_bytes, model.total_bytes)
        counts = (f"{model.num_parameters:,}", f"{model.max_rank_parameters:,}")
        models.add_row(model.name, model.layout, *counts, *(_binary(size) for size in sizes))
    console.print(models)


def _default(key: Key) -> str:
    if key.required:
        return "" if key.section else "required"  # a section is required where one of its keys is
    if isinstance(key.default, Section):
        return ""
    if key.default is None:
        return "null"
    return str(key.default).lower() if isinstance(key.default, bool) else str(key.default)


def _binary(num_bytes: int) -> str:
    """Bytes with the largest binary unit that leaves at least one of it."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{num_bytes} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"
