"""`megatron-rlt plan` as a user calls it: of every command's configuration, and what it says where nothing fits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rlt.cli import main
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.loading import load_overrides
from megatron_rlt.planning.memory import peak
from megatron_rlt.planning.planned import Planned, plan_configuration
from megatron_rlt.planning.target import command_of
from tests.config.conftest import workplace  # noqa: F401 - a fixture
from tests.config.valid import VALID
from tests.planning.plans import config_folder

_TRAIN = """
output_dir: run
world_size: 8
teacher: {model: 7b, layout: {tp: 2, sp: true}, recompute: full}
student: {model: 32b}
data: {path: nowhere}
prompts: {max_prompt_tokens: 1000}
rollout: {max_completion_tokens: 3000, max_batch_size: 32}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for size in ("7b", "32b"):
        config_folder(tmp_path / size, size)
    (tmp_path / "train.yaml").write_text(_TRAIN)
    return tmp_path


def _plan(*overrides: str, **settings: object) -> Planned:
    given = {"config": "train.yaml", "overrides": list(overrides)} | settings
    return plan_configuration(load_overrides(PlanConfig, given, []))


@pytest.mark.parametrize("command", [name for name in VALID if name != "prepare"])
@pytest.mark.usefixtures("workplace")
def test_every_commands_configuration_has_a_plan(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_of(yaml.safe_load(VALID[command]), source="-") == command
    assert main(["plan", f"{command}.yaml", "device=80GB"]) == 0
    printed = capsys.readouterr().out
    assert f"{command} on 1 rank (80GB, 74.5 GiB each)" in printed
    assert re.search(r"Peak: [\d.]+ GiB in \w+, on rank 0\. With 2\.0 GiB reserved", printed)


def test_neither_weights_nor_data_nor_torch_are_needed_and_it_is_quick(here: Path) -> None:
    program = (
        "import sys, time; start = time.process_time(); from megatron_rlt.cli import main;"
        "assert main(['plan', 'train.yaml']) == 0; assert 'torch' not in sys.modules;"
        "assert time.process_time() - start < 2, time.process_time() - start"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("here")
def test_what_does_not_fit_gets_changes_that_do() -> None:
    planned = _plan(device="h100")
    assert not planned.fits
    assert planned.limit is not None
    changes = [dict(one.change) for one in planned.remedies]
    assert {"student.layout.tp": 2, "student.layout.sp": True} in changes
    costs = [one.outcome.gpu_seconds for one in planned.remedies]
    assert costs == sorted(costs)
    for one in planned.remedies:
        assert one.outcome.peak.total <= planned.limit
    first = planned.remedies[0]
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in first.change.items()]
    if "student.fp8" not in first.change:
        assert peak(_plan(*words, device="h100").memory) == first.outcome.peak, "the plan of the change itself agrees"
    assert _plan(device="h200").fits


@pytest.mark.usefixtures("here")
def test_nodes_and_hours() -> None:
    one, two = _plan(nodes=1), _plan(nodes=2)
    assert (one.work.world_size, two.work.world_size) == (8, 16)
    assert one.hours is not None
    assert two.hours is not None
    assert one.hours > two.hours
    asked = _plan(hours=two.hours + 1e-6)
    assert asked.nodes_for_hours == 2
    assert _plan(hours=1e-3).nodes_for_hours is None


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["device=h1000"], "device=h1000: must be one of a100, "),
        (["device=5"], "device=5: must be one of"),
        (["calibrate=nowhere.jsonl"], "calibrate: no such file: nowhere.jsonl"),
        (["teacher.layout.tp=3"], "teacher.layout.tp=3: must divide"),
        (["teacher.model=nowhere"], "nowhere/config.json: no such file"),
        (["dveice=h100"], "dveice: unknown key"),
    ],
)
@pytest.mark.usefixtures("here")
def test_faults_are_one_clear_line(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train.yaml", *words]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_configuration_without_models_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prepare.yaml").write_text(VALID["prepare"])
    assert main(["plan", "prepare.yaml"]) == 2
    assert "nothing is to be planned" in capsys.readouterr().err
