"""`tools/gpu` in a dry run: what is measured on a GPU runs to its end with tiny sizes and emulated FP8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import forkserver
from tools.gpu import scoring, training

ROOT = Path(__file__).parents[2]
WORKSPACE = 100 * 2**20  # of every phase on a GPU, in the plan


def _main(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    {"scoring": scoring, "training": training}[module].main()


def run_dry(module: str, file: Path) -> dict[str, Any]:
    process = forkserver().Process(target=_main, args=(module, [str(file), "--dry"]))
    process.start()
    process.join(timeout=200)
    assert process.exitcode == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_scoring_measures_every_recipe_beside_bf16(tmp_path: Path) -> None:
    found = run_dry("scoring", tmp_path / "scoring.json")
    for way in ("blockwise", "tensorwise", "storage"):
        assert 0.0 < found[way]["gap"]["mean"] < 0.2
        assert found[way]["weight_bytes"] == found[way]["planned_weight_bytes"] < found["bf16"]["weight_bytes"]
    assert found["blockwise"]["pack_mates_gap"]["max"] == 0.0
    assert found["tensorwise"]["pack_mates_gap"]["max"] > 0.0
    for way in ("bf16", "blockwise", "tensorwise", "storage"):  # the plan of the peak stands beside the card's
        assert found[way]["predicted_peak_bytes"] > found[way]["weight_bytes"] + WORKSPACE
        assert found[way]["peak_bytes"] == 0  # there is no card
    memory = {way: facts["memory_against_first"] for way, facts in found["whole_model"].items()}
    assert memory == pytest.approx({"bf16": 1.0, "blockwise": 0.572, "tensorwise": 0.572, "storage": 0.572}, abs=1e-3)


def test_update_and_rollout_are_measured(tmp_path: Path) -> None:
    found = run_dry("training", tmp_path / "training.json")
    assert found["rollout of 16"]["work"]["decoded_rows"] == 16 * 3  # the first of 4 tokens comes from the prompt
    assert found["update in packs of 2048"]["tokens_per_second"] > 0
    small, large = (found[f"rollout of {count}"]["predicted_peak_bytes"] for count in (16, 128))
    assert large > small > WORKSPACE
    update = found["update in packs of 2048"]
    assert update["predicted_peak_bytes"] > update["planned_bytes"] + WORKSPACE


@pytest.mark.full
def test_the_script_runs_every_part(tmp_path: Path) -> None:
    script = ROOT / "tools" / "gpu" / "check.sh"
    done = subprocess.run(
        [script, tmp_path, "--dry"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("gpu_tests:", "gpu_scoring:", "gpu_training:", "gpu_step:")
    ]
