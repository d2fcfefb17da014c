"""Checks all rows of a job before a model loads, and reports the rejected ones by row and reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch.distributed as dist

from megatron_rlt.data.prepare import describe_counts
from megatron_rlt.data.rejection import RejectedRow, UnusableRowError
from megatron_rlt.given_files import FaultsError
from megatron_rlt.whole_files import write_text

_NUM_SHOWN = 3


class NumberedRow(Protocol):
    @property
    def row(self) -> int: ...  # 1-based in its source


Row = TypeVar("Row", bound=NumberedRow)


@dataclass(frozen=True)
class RowReport:
    """Result of checking all rows; equal on every rank."""

    num_usable: int
    rejected: tuple[RejectedRow, ...]  # in the source's order

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by reason."""
        return dict(Counter(rejected.reason.value for rejected in self.rejected))

    def describe_rejected(self, file: Path) -> str:
        """Describe how many rows were rejected and why; `file` lists them."""
        if not self.rejected:
            return "none rejected"
        return f"{len(self.rejected)} rejected ({describe_counts(self.counts)}), listed in {file}"

    def usable(self, rows: Iterable[Row | RejectedRow]) -> Iterator[Row]:
        """Filter the checked rows to the usable ones, in order."""
        rejected = {row.row for row in self.rejected}
        return (row for row in rows if not isinstance(row, RejectedRow) and row.row not in rejected)


def validate_rows(
    source: str, rows: Iterable[Row | RejectedRow], check: Callable[[Row], None], on_row: Callable[[str], None]
) -> RowReport:
    """Check every row; the ranks share the work. Collective on the whole job; raises ValueError if no row is usable.

    Args:
        source: name of the rows' source in errors.
        check: raises UnusableRowError.
        on_row: called before each row.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    unreadable: list[RejectedRow] = []
    mine: list[RejectedRow] = []
    num_readable = 0
    for row in rows:
        on_row(f"row {row.row}")
        if isinstance(row, RejectedRow):
            unreadable.append(row)
            continue
        if num_readable % world_size == rank:
            try:
                check(row)
            except UnusableRowError as error:
                mine.append(error.rejected(source, row.row))
        num_readable += 1
    everyone: list[list[RejectedRow]] = [[]] * world_size
    dist.all_gather_object(everyone, mine)
    refused = [rejected for part in everyone for rejected in part]
    rejected = tuple(sorted([*unreadable, *refused], key=lambda rejected: rejected.row))
    report = RowReport(num_readable - len(refused), rejected)
    _require_rows(source, report)
    return report


def write_rejected(file: Path, report: RowReport) -> None:
    """Write one JSON line per rejected row; replaces the file of an earlier start."""
    write_text(file, "".join(json.dumps(asdict(row)) + "\n" for row in report.rejected))


def _require_rows(source: str, report: RowReport) -> None:
    if report.num_usable > 0:
        return
    if not report.rejected:
        raise ValueError(f"no usable row in {source}: it has no rows")
    what = f"all {len(report.rejected)} rows were rejected ({describe_counts(report.counts)}); mend them"
    raise FaultsError(
        [f"no usable row in {source}: {what}", *(f"  {rejected}" for rejected in report.rejected[:_NUM_SHOWN])]
    )
