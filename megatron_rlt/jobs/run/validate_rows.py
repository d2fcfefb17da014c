"""A pass over all rows of a job before a model loads: which can be used, and the others by row and reason.

In: rows as they were read, and a check that knows formats and models. Out: a `Survey`, the same on every rank, and the
file of rejected rows. Reading is `data/`'s; what is checked is the job's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch.distributed as dist

from megatron_rlt.data.prepare import describe_counts
from megatron_rlt.data.rejection import RejectedRow, UnusableRowError

_NUM_SHOWN = 3


class NumberedRow(Protocol):
    """A row that could be read."""

    @property
    def row(self) -> int:
        """1-based in its source."""
        ...


Row = TypeVar("Row", bound=NumberedRow)


@dataclass(frozen=True)
class Survey:
    """What a pass over all rows found; the same on every rank."""

    num_usable: int
    rejected: tuple[RejectedRow, ...]  # in the source's order

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by reason."""
        return dict(Counter(rejected.reason.value for rejected in self.rejected))

    def describe_rejected(self, file: Path) -> str:
        """How many rows were rejected and why, in words; `file` lists them."""
        if not self.rejected:
            return "none rejected"
        return f"{len(self.rejected)} rejected ({describe_counts(self.counts)}), listed in {file}"


def survey_rows(
    source: str, rows: Iterable[Row | RejectedRow], check: Callable[[Row], None], on_row: Callable[[int], None]
) -> Survey:
    """Look at every row; the ranks share the costly check. Collective on the whole job.

    Args:
        source: where the rows come from, for errors.
        check: raises UnusableRowError.
        on_row: called with a row's number.

    Raises:
        ValueError: none of the rows is usable.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    unreadable: list[RejectedRow] = []
    mine: list[RejectedRow] = []
    num_readable = 0
    for row in rows:
        on_row(row.row)
        if isinstance(row, RejectedRow):
            unreadable.append(row)
            continue
        if num_readable % world_size == rank:
            try:
                check(row)
            except UnusableRowError as error:
                mine.append(RejectedRow(source, row.row, error.reason, error.column, error.detail))
        num_readable += 1
    everyone: list[list[RejectedRow]] = [[]] * world_size
    dist.all_gather_object(everyone, mine)
    refused = [rejected for part in everyone for rejected in part]
    rejected = tuple(sorted([*unreadable, *refused], key=lambda rejected: rejected.row))
    survey = Survey(num_readable - len(refused), rejected)
    _require_rows(source, survey)
    return survey


def write_rejected(file: Path, survey: Survey) -> None:
    """One JSON line a rejected row, also none; what an earlier start wrote is replaced by the same."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in survey.rejected), encoding="utf-8")
    temporary.replace(file)


def _require_rows(source: str, survey: Survey) -> None:
    if survey.num_usable > 0:
        return
    if not survey.rejected:
        raise ValueError(f"no usable row in {source}: it has no rows")
    quoted = "".join(f"\n  {rejected}" for rejected in survey.rejected[:_NUM_SHOWN])
    raise ValueError(
        f"no usable row in {source}: all {len(survey.rejected)} rows were rejected "
        f"({describe_counts(survey.counts)}); mend them{quoted}"
    )
