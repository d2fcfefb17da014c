"""What people read in a terminal of any width: tables whose numbers are never cut, a command's keys, its plan."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_rlt.config.keys import Key, keys_of
from megatron_rlt.config.plan import Plan
from megatron_rlt.config.section import Section


class NumberTable(Table):
    """A table that cuts nothing: in a terminal too narrow for it, the cells of each row stand below each other.

    The first column names the row and may wrap between words; the others hold one line each.
    """

    def __init__(self, title: str, headings: Sequence[str] = ("", ""), *, text_columns: int = 1) -> None:
        """`text_columns`: how many columns stand on the left before those of numbers."""
        super().__init__(title=title, title_justify="left", show_header=any(headings), show_edge=False, pad_edge=False)
        for place, heading in enumerate(headings):
            justify = "left" if place < text_columns else "right"
            self.add_column(heading, no_wrap=place > 0, justify=justify)  # type: ignore[arg-type]
        self._cells: list[tuple[str, ...]] = []

    def add_line(self, *cells: str) -> None:
        """Add a row of plain text, in which brackets are no markup."""
        self._cells.append(cells)
        self.add_row(*(Text(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._narrowest(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield Text(str(self.title), style="italic")
        for name, *cells in self._cells:
            yield Text(name)
            below = Table.grid(padding=(0, 2))
            for column, cell in zip(self.columns[1:], cells, strict=True):
                below.add_row(Text(str(column.header)), Text(cell, overflow="fold"))
            yield Padding(below, (0, 0, 0, 2), expand=False)

    def _narrowest(self, console: Console, options: ConsoleOptions) -> int:
        """Width in characters with the first column wrapped at every word."""
        names = [str(self.columns[0].header), *(cells[0] for cells in self._cells)]
        widest_name = max(Text(name).cell_len for name in names)
        widest_word = max((Text(word).cell_len for name in names for word in name.split()), default=0)
        unwrapped = self.__rich_measure__(console, options.update(width=10_000)).maximum
        return unwrapped - widest_name + widest_word


def show_keys(config_class: type[Section], console: Console) -> None:
    """Every key of a command's configuration with its default and its choices, its sentence below."""
    for key in keys_of(config_class):
        style = "bold" if key.section is None else "bold cyan"
        choices = f"  ({' | '.join(key.choices)})" if key.choices else ""
        console.print(Text.assemble((key.dotted, style), _default(key), (choices, "dim")), soft_wrap=True)
        console.print(Padding(Text(key.sentence), (0, 0, 0, 4), expand=False))


def show_plan(plan: Plan, console: Console) -> None:
    """Derived numbers, then what the fullest rank of every model holds."""
    numbers = NumberTable("Derived numbers")
    for name, value in plan.numbers:
        numbers.add_line(name, f"{value:,}")
    models = NumberTable(
        "\nFullest rank",
        ("model", "layout", "parameters", "of them here", "weights", "gradients", "optimizer", "sum"),
        text_columns=2,
    )
    for model in plan.models:
        sizes = (model.weight_bytes, model.gradient_bytes, model.optimizer_bytes, model.total_bytes)
        counts = (f"{model.num_parameters:,}", f"{model.max_rank_parameters:,}")
        models.add_line(model.name, model.layout, *counts, *(_binary(size) for size in sizes))
    for table in (numbers, models):
        if table.row_count > 0:
            console.print(table)


def _default(key: Key) -> str:
    if key.required:
        return "" if key.section else ": required"  # a section is required where one of its keys is
    if isinstance(key.default, Section):
        return ""
    return f": {_value(key.default)}"


def _value(value: object) -> str:
    """A default as YAML writes it, in one line."""
    if isinstance(value, str) and re.fullmatch(r"\S.*", value):
        return value
    return json.dumps(value, default=str)


def _binary(num_bytes: int) -> str:
    """Bytes with the largest binary unit that leaves at least one of it."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{num_bytes} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"
