"""`slurm/pipeline.sh` on a real Slurm: a chain with arrays ends by itself, and knows what is done and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_rlt.config.commands.collect import ShareConfig
from tests.distributed.tiny_runs import ROOT, SMALL_SFT, WARMUP_CONFIG
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm

_DEMO = ROOT / "configs" / "demo"
_CHOICES = ("seed=0", "seed=1 sampling.max_completion_tokens=3")


def _write_pipeline(jobs: Jobs) -> Path:
    folder, small = jobs.folder, ["metrics.tensorboard=false", "rollout.max_completion_tokens=8"]
    warm = f"{folder}/warm/hf"
    options = ["--ntasks-per-node=2", "--gpus-per-node=0", "--time=30", f"--output={folder}/%x-%A.out"]
    data = [f"data={jobs.inputs.shards}", f"output_dir={folder}/collected"]
    student = [f"student.model={jobs.inputs.model}", "student.dtype=float32"]
    held_out = jobs.inputs.model.parent / "held_out.jsonl"
    asked = [f"data={held_out}", "sampling.max_completion_tokens=4", "metrics.tensorboard=false"]
    stages = {
        "warmup": {
            "script": "sft",
            "config": str(WARMUP_CONFIG),
            "keys": [*SMALL_SFT, *jobs.inputs.for_sft, f"output_dir={folder}/warm"],
        },
        "collect": {
            "script": "collect",
            "config": str(_DEMO / "collect_2cpu_dp2.yaml"),
            "keys": [*small, *data, *student, f"teacher.model={warm}", "num_explanations=2"],
            "shares": 2,
        },
        "evaluate": {
            "script": "evaluate",
            "config": str(_DEMO / "evaluate_2cpu_dp2.yaml"),
            "keys": [*asked, f"model.model={warm}", f"output_dir={folder}/answers"],
            "each": list(_CHOICES),
            "after": ["warmup"],
        },
    }
    stages = {name: stage | {"options": options} for name, stage in stages.items()}
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return file


def test_a_chain_with_a_stage_that_fails_once_ends_by_itself_and_is_not_submitted_again(jobs: Jobs) -> None:
    once = jobs.folder / "failed-once"
    program = jobs.folder / "program"
    program.write_text(
        f'#!/bin/bash\nif [ "$1" = collect ] && mkdir {once} 2>/dev/null; then exit 1; fi\nexec {jobs.program} "$@"\n'
    )
    program.chmod(0o755)
    file = _write_pipeline(jobs)
    environment = {
        "RLT_PROGRAM": str(program),
        "RLT_LOGIN_PROGRAM": str(jobs.program),
        "RLT_SITE": "/dev/null",
        "RLT_PREFLIGHT": "0",
    }

    def pipeline(*arguments: str) -> list[str]:
        return jobs.cluster.call("slurm/pipeline.sh", str(file), *arguments, env=environment).splitlines()

    planned = pipeline("--dry-run")
    assert [line.split()[0] for line in planned] == ["sbatch"] * 3
    assert "--array=0-1" in planned[1]
    assert "--dependency=afterok:JOB_OF_warmup" in planned[2]
    assert not jobs.cluster.call("squeue", "--noheader")

    submitted = pipeline()
    assert [line.partition(":")[0] for line in submitted] == ["warmup", "collect", "evaluate"]
    again = pipeline()
    assert all(" is PENDING" in line or " is RUNNING" in line or "COMPLETING" in line for line in again), again

    jobs.cluster.drain(180)
    printed = "\n".join(path.read_text() for path in jobs.folder.glob("*.out"))
    assert [line.split(": ")[1] for line in pipeline("--status")] == ["done"] * 3, printed
    assert once.is_dir()
    assert "this is 1): back into the queue" in printed
    joined = (jobs.folder / "collected" / "scored" / "sft_first.jsonl").read_text().splitlines()
    shares = [ShareConfig(index=index, count=2).rows(10) for index in range(2)]
    assert [len(share) for share in shares] == [5, 5]
    assert 0 < len(joined) <= 10
    assert len({json.loads(line)["id"] for line in joined}) == len(joined)
    for name in ("seed-0", "seed-1-sampling.max-completion-tokens-3"):
        assert (jobs.folder / "answers" / name / "results.json").is_file()
    assert pipeline() == [f"{name}: done" for name in ("warmup", "collect", "evaluate")]


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "pipelines").glob("*.yaml")), ids=lambda path: path.stem)
def test_slurm_takes_every_line_of_the_shipped_pipelines(jobs: Jobs, recipe: Path) -> None:
    """As on a cluster of three nodes without GPUs, so with fewer nodes and none of them."""
    lines = jobs.cluster.call(
        "slurm/pipeline.sh", str(recipe), "--dry-run", env={"RLT_LOGIN_PROGRAM": str(jobs.program)}
    ).splitlines()
    assert len(lines) == 5
    for line in lines:
        words = [word for word in line.split() if not word.startswith("--dependency")]
        words[1:1] = ["--test-only"]
        small = " ".join("--nodes=3" if word.startswith("--nodes=") else word for word in words)
        jobs.cluster.call("bash", "-c", small.replace(" slurm/", " --gpus-per-node=0 slurm/", 1))
