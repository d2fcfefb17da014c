"""The tutorial's commands run as they are written, in one shell; then all other snippets in the folder they left.

`megatron-rlt` is found on PATH as a reader's is, but runs preloaded: that an installed one starts is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, blocks, page_names

TUTORIAL = "tutorial.md"
_TIMEOUT_SECONDS = 900.0
_RESULTS = (
    "shards/rejected.jsonl",
    "warmup/hf/model.safetensors",
    "rlt/metrics.jsonl",
    "rlt/completions/step-000002.parquet",
    "rlt/hf/model.safetensors",
    "scores.parquet",
    "collected/scored/explanations.parquet",
    "collected/scored/sft_best_of_n.jsonl",
    "collected/scored/sft_first.jsonl",
    "distilled/hf/model.safetensors",
    "evaluated/results.json",
    "evaluated/verdicts.parquet",
)

pytestmark = pytest.mark.slow


def _all(language: str) -> list[Block]:
    return [block for page in page_names() for block in blocks(page, language) if block.runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, preloaded: Path) -> Path:
    """Where the tutorial's commands left their files."""
    clone = tmp_path_factory.mktemp("clone")
    run_bash("\n".join(block.text for block in blocks(TUTORIAL, "bash") if block.runs), clone, preloaded)
    return clone / "runs" / "tutorial"


def run_bash(script: str, folder: Path, preloaded: Path) -> None:
    """Run a script as a reader would in an installed clone; a command that fails fails the test."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {
        "PATH": f"{preloaded.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def test_the_tutorial_works_as_it_is_written(folder: Path) -> None:
    assert [name for name in _RESULTS if not (folder / name).is_file()] == []


@pytest.mark.parametrize("block", _all("python"), ids=str)
def test_a_python_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, block: Block) -> None:
    monkeypatch.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block.text, str(block), "exec"), {"__name__": "__snippet__"})
    assert output.getvalue().strip(), "a snippet shows something"
    for shown in blocks(block.page, "text"):
        if shown.note == "printed by the block above":
            assert shown.text in output.getvalue()


@pytest.mark.parametrize("block", [block for block in _all("bash") if block.page != TUTORIAL], ids=str)
def test_the_commands_of_another_page_pass_a_dry_run(folder: Path, preloaded: Path, block: Block) -> None:
    """Each in its own shell, in which every command of ours is given `--dry-run`; `reweigh`, which has none, is run."""
    run = '{ if [ "$1" = reweigh ]; then command NAME "$@"; else command NAME "$@" --dry-run; fi; }'
    dry = "".join(f"{name}() {run.replace('NAME', name)}\n" for name in ("megatron-rlt", "torchrun"))
    run_bash(f"{dry}{block.text}", folder, preloaded)
