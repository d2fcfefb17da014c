"""A small part of the campaign of `tools/chaos`: its table has no failure, and it would have one if there were any."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tools.chaos.campaign import main
from tools.chaos.cases import Case, cases, make_inputs
from tools.chaos.lives import Reference, live, undisturbed
from tools.chaos.table import Row, rows
from tools.chaos.units import Record

_SMALL = ["--forked-lives", "1", "--kills-per-forked-life", "2", "--full-disks", "1", "--second-starts", "1"]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Reference]:
    folder = tmp_path_factory.mktemp("chaos")
    case = next(case for case in cases(make_inputs(folder / "inputs")) if case.name == "prepare")
    return case, undisturbed(case, folder / "undisturbed")


def test_a_small_campaign_has_no_failure_and_goes_on_where_it_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chaos.json"
    arguments = [str(tmp_path / "runs"), "--out", str(file), *_SMALL, "--only"]
    prepared = [f"{column}/prepare/*" for column in ("forked", "disk", "second")]
    assert main([*arguments, *prepared]) == 0, capsys.readouterr()
    first = json.loads(file.read_text())["units"]
    assert sorted(first) == ["disk/prepare/0", "forked/prepare/0", "second/prepare/0"]
    assert main([*arguments, *prepared, "forked/sft-1/*"]) == 0, capsys.readouterr()
    content = json.loads(file.read_text())
    assert {name: content["units"][name] for name in first} == first, "done again"
    assert content["kills"] >= 1
    assert "| SIGKILLs of `sft`, 1 rank | " in capsys.readouterr().out


def test_a_life_that_ends_otherwise_is_a_failure(prepare: tuple[Case, Reference], tmp_path: Path) -> None:
    case, reference = prepare
    name = next(iter(reference.results))
    other = Reference(reference.results | {name: "another"}, reference.counts, reference.seconds, reference.num_bytes)
    life = live(case, other, "forked", tmp_path / "root", random.Random(0), max_kills=0, seconds=0.1)
    assert life.faults == [f"differs: {name}"]


def _units() -> dict[str, Record]:
    sound: Record = {"kills": {"any": 2, "export": 1}, "faults": []}
    return {
        "forked/sft-2/0": sound,
        "forked/sft-2/1": sound | {"faults": ["differs: hf/model.safetensors"]},
        "disk/prepare/0": {"met": True, "faults": []},
        "suite/servers": {"not_here": "vLLM is not installed", "faults": []},
    }


def test_the_table_counts_kills_and_failures() -> None:
    table = rows(_units())
    campaign = "python -m tools.chaos.campaign"
    assert table[0] == Row(
        "SIGKILLs of `sft`, 2 ranks",
        "6 kills in 2 runs: 0 of whole commands, 6 of forked ones",
        1,
        f"{campaign} --only 'whole/sft-2/*' 'forked/sft-2/*'",
    )
    assert table[1] == Row("all SIGKILLs: 4 before any operation on files, 2 in an export", "6 kills", 1, campaign)
    assert table[2].count == "1, 1 full"
    assert table[3].count == "vLLM is not installed"
