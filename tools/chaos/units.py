"""The campaign's units: each is one try, is seeded by its name, and comes to one record."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tools.chaos.cases import Case, Inputs, cases, make_inputs
from tools.chaos.disks import MountError
from tools.chaos.disturbances import full_disk, listening, second_start
from tools.chaos.lives import Reference, live, undisturbed
from tools.chaos.starts import Kind
from tools.chaos.suites import SUITES, Suite, run_fuzzer, run_suite

Record = dict[str, Any]
"""JSON: what a unit found; `faults` are failures, in one line each."""

_STARTED_ANEW = 1.5  # times as long as a forked run, from lock to end: some imports come late


@dataclass(frozen=True)
class Unit:
    """One try."""

    name: str  # COLUMN/CASE or COLUMN/CASE/NUMBER
    run: Callable[[], Record]

    @property
    def column(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Amounts:
    """How much of everything; per case, where nothing else is said."""

    forked_lives: int = 6
    whole_lives: int = 1
    kills_per_forked_life: int = 6
    kills_per_whole_life: int = 2
    full_disks: int = 2
    second_starts: int = 2
    malformed_inputs: int = 5000  # in all


class Campaign:
    """Inputs and undisturbed runs in one folder, made when first needed."""

    def __init__(self, folder: Path, seed: int, amounts: Amounts) -> None:
        self._folder, self._seed, self._amounts = folder, seed, amounts
        self._references: dict[str, Reference] = {}

    @cached_property
    def _inputs(self) -> Inputs:
        return make_inputs(self._folder / "inputs")

    def units(self) -> Iterator[Unit]:
        """All units, a round of every kind after the other, so that a campaign that is cut has some of each."""
        amounts, found = self._amounts, cases(self._inputs)
        yield from (Unit(f"sockets/{case.name}", partial(self._listen, case)) for case in found)
        rounds = max(amounts.forked_lives, amounts.whole_lives, amounts.full_disks, amounts.second_starts)
        for number in range(rounds):
            for case in found:
                yield from self._round(case, number)
        yield from (Unit(f"suite/{suite.name}", partial(_suite, suite)) for suite in SUITES)
        yield Unit("suite/malformed", partial(_malformed, amounts.malformed_inputs))

    def _round(self, case: Case, number: int) -> Iterator[Unit]:
        amounts = self._amounts
        if number < amounts.forked_lives:
            yield self._life(case, "forked", number, amounts.kills_per_forked_life)
        if number < amounts.whole_lives:
            yield self._life(case, "whole", number, amounts.kills_per_whole_life)
        if number < amounts.full_disks:
            yield self._try(f"disk/{case.name}/{number}", case, full_disk)
        if number < amounts.second_starts:
            yield self._try(f"second/{case.name}/{number}", case, second_start)

    def _life(self, case: Case, kind: Kind, number: int, max_kills: int) -> Unit:
        name = f"{kind}/{case.name}/{number}"

        def run() -> Record:
            reference = self._reference(case)
            seconds = reference.seconds * (_STARTED_ANEW if kind == "whole" else 1.0)
            root, rng = self._root(name), self._rng(name)
            return asdict(live(case, reference, kind, root, rng, max_kills=max_kills, seconds=seconds))

        return Unit(name, run)

    def _try(
        self, name: str, case: Case, disturb: Callable[[Case, Reference, Path, random.Random], tuple[bool, list[str]]]
    ) -> Unit:
        def run() -> Record:
            try:
                met, faults = disturb(case, self._reference(case), self._root(name), self._rng(name))
            except MountError as error:
                return {"not_here": str(error), "faults": []}
            return {"met": met, "faults": faults}

        return Unit(name, run)

    def _listen(self, case: Case) -> Record:
        kinds, faults = listening(case, self._reference(case), self._root(f"sockets/{case.name}"))
        return {"sockets": kinds, "faults": faults}

    def _reference(self, case: Case) -> Reference:
        if case.name not in self._references:
            self._references[case.name] = undisturbed(case, self._root(f"undisturbed/{case.name}"))
        return self._references[case.name]

    def _root(self, name: str) -> Path:
        root = self._folder / "roots" / name.replace("/", "-")
        shutil.rmtree(root, ignore_errors=True)  # of a campaign that was cut, or that failed here
        root.parent.mkdir(parents=True, exist_ok=True)
        return root

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {name}")


def _suite(suite: Suite) -> Record:
    counts = run_suite(suite)
    if counts is None:
        return {"not_here": "vLLM is not installed: see `make test-vllm`", "faults": []}
    return {"passed": counts.passed, "skipped": counts.skipped, "faults": list(counts.faults)}


def _malformed(num_inputs: int) -> Record:
    groups, faults = run_fuzzer(num_inputs)
    return {"groups": groups, "faults": faults}
