"""Every file of the project against the table in `rooms.py`, and the table's reader against code that breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture.rooms import MAY_IMPORT, PACKAGE, broken_rules, room_of, size_faults

_ROOT = Path(__file__).parents[2]


def test_no_file_of_the_package_breaks_the_table() -> None:
    folder = _ROOT / PACKAGE
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    assert len(files) > 40, "the package was not found"
    assert [fault for path, file in sorted(files.items()) for fault in broken_rules(path, file.read_text())] == []


def test_tools_and_tests_keep_the_same_ceilings() -> None:
    files = [file for folder in ("tools", "tests") for file in (_ROOT / folder).rglob("*.py")]
    paths = {file.relative_to(_ROOT).as_posix(): file for file in files}
    assert [fault for path, file in sorted(paths.items()) for fault in size_faults(path, file.read_text())] == []


def test_every_room_stands_in_the_table() -> None:
    package = _ROOT / PACKAGE
    rooms = {room_of(file.relative_to(package).as_posix()) for file in package.rglob("*.py")} - {"__init__"}
    assert rooms == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("path", "code", "fault"),
    [
        ("rewards/x.py", "from megatron_rlt.algorithm import advantages", "2: rewards must not import algorithm"),
        ("rewards/x.py", "from megatron_rlt.parallel.platform import world", "2: rewards must not import parallel"),
        ("models/x.py", "import megatron_rlt.policy.policy", "2: models must not import policy"),
        ("jobs/x.py", "def f():\n    from megatron_rlt.cli import main", "3: jobs must not import cli"),
        ("algorithm/x.py", "import torch.distributed as dist", "2: imports torch.distributed, but deals with plain"),
        ("algorithm/x.py", "from torch import distributed", "2: imports torch.distributed, but deals with plain"),
        ("config/x.py", "from torch import nn", "2: imports torch.nn, but must work before torch is imported"),
        ("metrics/x.py", "from megatron.core import mpu", "2: imports megatron.core; only parallel/, models/"),
        (
            "jobs/train/x.py",
            "from megatron_rlt.jobs.collect.rows import x",
            "2: jobs/train must not import jobs/collect",
        ),
        ("jobs/run/x.py", "from megatron_rlt.jobs.rl import grpo", "2: jobs/run must not import jobs/rl"),
        ("rollout/x.py", "import megatron_rlt.rollout.vllm.client", "2: rollout must not import rollout/vllm"),
        ("jobs/x.py", "import pyarrow.parquet as pq", "2: imports pyarrow; only data/, store/ may"),
        ("parallel/x.py", "import os\nx = os.environ['RANK']", "3: reads the environment"),
        ("parallel/x.py", "from os import getenv", "2: reads the environment"),
        ("data/utils.py", "x = 1", ": the name 'utils' says nothing"),
        ("data/x.py", "x = 1\n" * 300, ": 301 lines, at most 300"),
        ("data/x.py", "def f():\n" + "    x = 1\n" * 60, "2: f has 61 lines, at most 60"),
    ],
)
def test_the_reader_finds_what_breaks_the_table(path: str, code: str, fault: str) -> None:
    faults = broken_rules(path, f'"""A module."""\n{code}')
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}{fault if fault.startswith(':') else f':{fault}'}")


def test_a_module_without_a_docstring_is_found_and_an_empty_one_is_fine() -> None:
    assert broken_rules("data/x.py", "x = 1\n") == ["data/x.py: has no docstring that says what it is for"]
    assert broken_rules("data/__init__.py", "") == []
