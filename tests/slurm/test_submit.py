"""What a job refuses before its ranks start, and that Slurm takes every recipe of the paper as it is shipped."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.disk.mounts import read_only, small_disk
from tests.slurm.cluster import ROOT
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm

_SCRIPTS = {"sft": "sft", "rlt": "train_rlt", "rlvr": "train_rlt", "collect": "collect", "evaluate": "evaluate"}
_RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("prepare_"))


def _larger_model(jobs: Jobs) -> Path:
    """Twelve million weights."""
    folder = Path(shutil.copytree(jobs.inputs.model, jobs.folder / "larger"))
    config = LlamaConfig.from_pretrained(folder, hidden_size=512, intermediate_size=1280, num_hidden_layers=4)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _refused(jobs: Jobs, *settings: str) -> str:
    """What a job printed that ended for good as bad input, without ranks; its run folder lies on `disk`."""
    job = jobs.train("disk/run", *settings, options=(f"--output={jobs.folder}/run.out",))
    job = replace(job, output=jobs.folder / "run.out")
    state = job.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0), job.text()
    assert not list(job.run.glob("attempts/*/rank-*.log"))
    return job.printed


def test_a_full_disk_is_bad_input_in_the_preflight(jobs: Jobs) -> None:
    with small_disk(jobs.folder / "disk", 1 << 20):
        printed = _refused(jobs)
    assert re.search(r"folder: \S*/disk/run/file cannot be written: No space left on device \([\d,]+ bytes", printed), (
        printed
    )


def test_a_disk_without_room_for_a_checkpoint_is_bad_input_in_the_preflight(jobs: Jobs) -> None:
    """The files of 64 MiB that two nodes write fit; a checkpoint of some 200 MB does not."""
    model = _larger_model(jobs)
    with small_disk(jobs.folder / "disk", 140 << 20):
        printed = _refused(jobs, f"teacher.model={model}")
    assert re.search(r"folder: output_dir: [\d,]+ bytes are free there, and one checkpoint takes up to", printed), (
        printed
    )


def test_a_read_only_folder_is_bad_input(jobs: Jobs) -> None:
    folder = jobs.folder / "disk"
    folder.mkdir()
    with read_only(folder):
        printed = _refused(jobs)
    assert f"output_dir: {folder}/run cannot be written" in printed


def test_a_job_submitted_from_elsewhere_says_from_where(jobs: Jobs) -> None:
    output, script = jobs.folder / "run.out", ROOT / "slurm" / "sft.sbatch"
    options = ("--parsable", f"--output={output}", "--gpus-per-node=0")
    state = jobs.cluster.wait(jobs.cluster.call("env", "-C", str(jobs.folder), "sbatch", *options, str(script), "x"))
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0)
    assert "submit from the folder of the clone, or set RLT_HOME to it" in output.read_text()


@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda path: path.stem)
def test_slurm_takes_every_recipe_on_its_nodes(jobs: Jobs, recipe: Path) -> None:
    """Of a name such as `rlt_qwen2.5-7b_1x8_tp2sp_tp2`; as on a cluster of three nodes without GPUs."""
    command, nodes = recipe.stem.split("_")[0], re.findall(r"_(\d+)x8_", recipe.stem)[0]
    sizes = (f"--nodes={min(int(nodes), 3)}", "--gpus-per-node=0")
    jobs.cluster.call("sbatch", "--test-only", *sizes, f"slurm/{_SCRIPTS[command]}.sbatch", str(recipe))
