"""Every recipe runs, each on what the one before left: tiny models and rows, all else as it stands.

What is replaced is named here: paths, the number of ranks, layouts, sizes and lengths. Precision, recomputation,
schedules, losses, rewards and selections are the recipe's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, ROOT, TinyInputs
from tests.fp8_scores import small_student

FOLDER = ROOT / "configs"
LAYOUTS = (
    pytest.param("{tp: 2, sp: true}", id="tp2-sp"),
    pytest.param("{pp: 2}", id="pp2", marks=pytest.mark.full),
)
NUM_ROWS = 4
_TAGS = json.dumps(yaml.safe_load(RL_CONFIG.read_text())["prompts"])  # of the tiny model's vocabulary
_TINY = ["world_size=2", "metrics.tensorboard=false", f"prompts={_TAGS}"]
_TINY_SFT = ["num_epochs=1", f"global_batch_size={NUM_ROWS}", "max_tokens=128"]
_TINY_RL = ["num_steps=1", "grpo.questions_per_step=2", "grpo.group_size=4", "rollout.max_completion_tokens=24"]
_TINY_EVALUATION = ["kind=math", "columns.answer=solution", "sampling.num_samples=2"]


@dataclass(frozen=True)
class Recipe:
    """A recipe made tiny."""

    file: str
    command: str
    models: tuple[str, ...]  # sections that get the layout of the test
    overrides: list[str]

    def run(self, output_dir: Path, layout: str) -> Path:
        """Run it on two ranks; returns its run folder."""
        layouts = [f"{name}.layout={layout}" for name in self.models]
        overrides = [*_TINY, *layouts, *self.overrides] if self.models else self.overrides
        attempt = Command(self.command, FOLDER / self.file, overrides, output_dir / Path(self.file).stem).finish()
        assert attempt.status == 0, f"{self.file}:\n{attempt.errors}"
        return output_dir / Path(self.file).stem


def _recipes(inputs: TinyInputs, rows: Path, folder: Path) -> list[Recipe]:
    """All of them in the order in which a user runs them, each with what those before it leave in `folder`."""
    base, shards, mathematics = inputs.model, folder / "prepare_stratos-17k", folder / "prepare_math"
    warm, rlt = folder / "sft_warmup_qwen2.5-7b_1x8_tp2sp" / "hf", folder / "rlt_qwen2.5-7b_1x8_tp2sp_tp2" / "hf"
    large = small_student(folder / "large", teacher=base)  # blocks of 128 x 128 need more than the tiny model's sizes
    collected = folder / "collect_qwen2.5-7b_1x8_dp8" / "scored" / "sft_first.jsonl"
    student = folder / "sft_distill_qwen2.5-7b_1x8_tp2sp" / "hf"
    collecting = [f"teacher.model={rlt}", f"student.model={base}", f"data={shards}", "rollout.max_completion_tokens=24"]
    evaluating = [f"model.model={student}", f"data={rows}", "sampling.max_completion_tokens=24", *_TINY_EVALUATION]
    distilling = [f"model.model={base}", f"data.path={collected}", *_TINY_SFT]
    solving = [f"student.model={student}", f"data.path={mathematics}", *_TINY_RL]
    both = ("teacher", "student")
    return [
        Recipe("prepare_stratos-17k.yaml", "prepare", (), [f"input=[{rows}]"]),
        Recipe("prepare_math.yaml", "prepare", (), [f"input=[{rows}]", "columns.question=question"]),
        Recipe(
            "sft_warmup_qwen2.5-7b_1x8_tp2sp.yaml",
            "sft",
            ("model",),
            [f"model.model={base}", f"data.path={shards}", *_TINY_SFT],
        ),
        Recipe(
            "rlt_qwen2.5-7b_1x8_tp2sp_tp2.yaml",
            "train",
            both,
            [f"teacher.model={warm}", f"student.model={base}", f"data.path={shards}", *_TINY_RL],
        ),
        Recipe(
            "rlt_qwen2.5-7b_student-32b_4x8_tp2sp_tp2sp_fp8.yaml",
            "train",
            both,
            [f"teacher.model={warm}", f"student.model={large}", f"data.path={shards}", *_TINY_RL],
        ),
        Recipe("collect_qwen2.5-7b_1x8_dp8.yaml", "collect", both, collecting),
        Recipe("sft_distill_qwen2.5-7b_1x8_tp2sp.yaml", "sft", ("model",), distilling),
        Recipe("sft_distill_qwen2.5-32b_4x8_tp8sp_pp2.yaml", "sft", ("model",), distilling),
        Recipe("rlvr_qwen2.5-7b_1x8_tp2sp.yaml", "rlvr", ("student",), solving),
        Recipe("evaluate_qwen2.5-7b_1x8_dp8.yaml", "evaluate", ("model",), evaluating),
    ]


@pytest.fixture(scope="module")
def rows(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows with traces."""
    lines = (inputs.model.parent / "train.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("recipes") / "rows.jsonl"
    file.write_text("".join(lines[:NUM_ROWS]))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_recipe_runs_on_what_the_one_before_left(
    inputs: TinyInputs, rows: Path, tmp_path: Path, layout: str
) -> None:
    recipes = _recipes(inputs, rows, tmp_path)
    assert sorted(recipe.file for recipe in recipes) == sorted(file.name for file in FOLDER.glob("*.yaml"))
    for recipe in recipes:
        run = recipe.run(tmp_path, layout)
        if recipe.command in ("sft", "train"):
            (step,) = read_metrics(run)
            assert all(math.isfinite(value) for value in step.values()), recipe.file
            assert (run / "hf" / "model.safetensors").is_file()
    assert len((tmp_path / "collect_qwen2.5-7b_1x8_dp8/scored/sft_first.jsonl").read_text().splitlines()) == NUM_ROWS
    answered = json.loads((tmp_path / "evaluate_qwen2.5-7b_1x8_dp8" / "results.json").read_text())
    assert answered["questions"] == NUM_ROWS
