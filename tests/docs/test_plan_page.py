"""The plan that is explained, and the table of planned runs, are what the command says today."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.cli import main
from tests.docs.pages import PAGES, ROOT, blocks
from tests.planning.planned_32b import WAYS, row
from tests.planning.plans import config_folder

PAGE = "how-to/plan.md"
CONFIG = ROOT / "configs" / "rlt_qwen2.5-7b_1x8_tp2sp_tp2.yaml"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shipped configurations look for their models; a folder with config.json is enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for place in ("runs/warmup_7b/hf", "models/Qwen2.5-7B-Instruct", "models/Bespoke-Stratos-7B"):
        config_folder(tmp_path / place, "7b")
    config_folder(tmp_path / "models/Qwen2.5-32B-Instruct", "32b")


@pytest.mark.usefixtures("models")
def test_the_explained_plan_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command = blocks(PAGE, "bash")[0].text.replace("\\\n", " ").split()
    assert command[:3] == ["megatron-rlt", "plan", f"configs/{CONFIG.name}"]
    assert main(["plan", str(CONFIG), *command[3:]]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert [block.text.rstrip() for block in blocks(PAGE, "text")][:1] == [printed.rstrip()]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("nodes", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_the_table_of_planned_runs_is_todays(nodes: int, way: str) -> None:
    assert row(nodes, way) in (PAGES / PAGE).read_text(encoding="utf-8").splitlines()
