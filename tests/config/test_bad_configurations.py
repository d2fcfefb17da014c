"""Every fault of a user's configuration gets its line, exit status 2 and nothing else on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlt.cli import main

_CASES = yaml.safe_load(Path(__file__).with_name("bad_configurations.yaml").read_text())


def _name(case: dict[str, Any]) -> str:
    return f"{case['command']} {' '.join(case.get('set', [case.get('file')]))}"


@pytest.mark.parametrize("case", _CASES, ids=_name)
def test_a_fault_is_one_line_and_exit_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], case: dict[str, Any]
) -> None:
    command = case["command"]
    if "file" in case:
        (workplace / f"{command}.yaml").write_text(case["file"])

    status = main([command, f"{command}.yaml", *case.get("set", [])])

    lines = [line.replace(str(workplace), "WORKPLACE") for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"megatron-rlt: error: {line}" for line in case["lines"]]
    assert status == 2


def test_the_table_has_at_least_40_cases_and_none_twice() -> None:
    assert len({_name(case) for case in _CASES}) == len(_CASES) >= 40


def test_a_missing_file_and_a_folder_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gone.yaml"]) == 2
    assert main(["train", "empty_folder"]) == 2
    (workplace / "latin1.yaml").write_bytes(b"output_dir: \xe9")
    assert main(["train", "latin1.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "megatron-rlt: error: gone.yaml: no such file; give the path of a YAML file",
        "megatron-rlt: error: empty_folder: is a folder, not a file; give the path of a YAML file",
        "megatron-rlt: error: latin1.yaml: not UTF-8 text (byte 12); save the file as UTF-8",
    ]
