"""The campaign's table: a row per kind of disturbance, with counts, failures, and the command that repeats it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tools.chaos.lives import AT_RANDOM
from tools.chaos.suites import FUZZ, SUITES
from tools.chaos.units import Record

_KINDS = {"whole": "of whole commands", "forked": "of forked ones"}
"""Whole ones are started as users start them; forked ones begin with all imports done."""
_AIMS = {
    "any": "before any operation on files",
    "save": "in a save",
    "export": "in an export",
    "removal": "in a removal",
    AT_RANDOM: "at a random moment",
}
_CAMPAIGN = "python -m tools.chaos.campaign"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    count: str
    failures: int
    command: str


def rows(units: Mapping[str, Record]) -> list[Row]:
    """The table of all units that have run."""
    return [*_kills(units), *_tries(units), *_sockets(units), *_suites(units), *_malformed(units)]


def markdown(table: Iterable[Row]) -> str:
    """As it stands in the documentation."""
    lines = ["| what | count | failures | command |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.what} | {row.count} | {row.failures} | `{row.command}` |" for row in table)])


def num_kills(units: Mapping[str, Record]) -> int:
    """SIGKILLs of all lives."""
    return sum(_num_kills(record) for column in _KINDS for record in _of(units, column).values())


def _kills(units: Mapping[str, Record]) -> list[Row]:
    lives = {name: record for kind in _KINDS for name, record in _of(units, kind).items()}
    aims: Counter[str] = Counter()
    for record in lives.values():
        aims.update(record["kills"])
    table = [
        _kills_of(case, {name: record for name, record in lives.items() if name.split("/")[1] == case})
        for case in dict.fromkeys(name.split("/")[1] for name in lives)
    ]
    if aims:
        shown = ", ".join(f"{number} {_AIMS[aim]}" for aim, number in sorted(aims.items()))
        table.append(Row(f"all SIGKILLs: {shown}", f"{aims.total()} kills", _failed(lives.values()), _CAMPAIGN))
    return table


def _kills_of(case: str, lives: Mapping[str, Record]) -> Row:
    by_kind = {kind: sum(map(_num_kills, _of(lives, kind).values())) for kind in _KINDS}
    parts = ", ".join(f"{number} {_KINDS[kind]}" for kind, number in by_kind.items())
    count = f"{sum(by_kind.values())} kills in {len(lives)} runs: {parts}"
    patterns = " ".join(f"'{kind}/{case}/*'" for kind in _KINDS)
    return Row(f"SIGKILLs of {_shown(case)}", count, _failed(lives.values()), f"{_CAMPAIGN} --only {patterns}")


def _num_kills(life: Record) -> int:
    number: int = sum(life["kills"].values())
    return number


def _shown(case: str) -> str:
    """`sft-2` -> "`sft`, 2 ranks"."""
    command, _, ranks = case.partition("-")
    return f"`{command}`" + (f", {ranks} rank{'' if ranks == '1' else 's'}" if ranks else "")


def _tries(units: Mapping[str, Record]) -> list[Row]:
    table = []
    for column, what, met in (
        ("disk", "disks too small by a random share, then enlarged", "full"),
        ("second", "two starts on one place", "met"),
    ):
        records = [record for record in _of(units, column).values() if "met" in record]
        left_out = {record["not_here"] for record in _of(units, column).values() if "not_here" in record}
        if records or left_out:
            count = f"{len(records)}, {sum(record['met'] for record in records)} {met}"
            command = f"{_CAMPAIGN} --only '{column}/*'"
            table.append(Row(what, count if records else f"left out: {'; '.join(left_out)}", _failed(records), command))
    return table


def _sockets(units: Mapping[str, Record]) -> list[Row]:
    records = _of(units, "sockets")
    if not records:
        return []
    found = sorted({kind for record in records.values() for kind in record["sockets"]})
    count = f"{len(records)} commands; {', '.join(found) or 'none'}"
    command = f"{_CAMPAIGN} --only 'sockets/*'"
    return [Row("listening sockets of undisturbed commands", count, _failed(records.values()), command)]


def _suites(units: Mapping[str, Record]) -> list[Row]:
    table = []
    for suite in SUITES:
        record = units.get(f"suite/{suite.name}")
        if record is None:
            continue
        count = record.get("not_here") or f"{record['passed']} passed" + (
            f", {record['skipped']} skipped" if record["skipped"] else ""
        )
        table.append(Row(suite.what, count, len(record["faults"]), suite.command))
    return table


def _malformed(units: Mapping[str, Record]) -> list[Row]:
    record = units.get("suite/malformed")
    if record is None:
        return []
    groups = record["groups"]
    table = []
    for name, group in groups.items():
        count = f"{group['inputs']}: {group['refused']} refused, {group['legal']} legal"
        failed = group["inputs"] - group["refused"] - group["legal"]
        number = sum(one["inputs"] for one in groups.values())
        table.append(Row(f"malformed inputs: {name}", count, failed, f"FUZZ_INPUTS={number} pytest -s {FUZZ}"))
    return table


def _of(units: Mapping[str, Record], column: str) -> dict[str, Record]:
    return {name: record for name, record in units.items() if name.partition("/")[0] == column}


def _failed(records: Iterable[Record]) -> int:
    return sum(bool(record["faults"]) for record in records)
