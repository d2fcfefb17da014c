"""`megatron-rlt pipeline`: submits the stages of a chain that are neither done nor in the queue, each after the others.

Which are done is seen by their results, which wait or run by the names of the jobs: there is no file to go stale.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.loading import has_section, load_config
from megatron_rlt.config.pipeline import PipelineConfig, StageConfig, pipeline_faults
from megatron_rlt.given_files import FaultsError

_COMMANDS = {"train_rlt": "train"}  # of scripts whose command has another name
_DRY_ID = "JOB_OF_{}"


@dataclass(frozen=True)
class Stage:
    """A stage with what decides whether it is done."""

    name: str
    job_name: str
    config: StageConfig
    results: tuple[Path, ...]  # all there: done
    after: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return all(path.exists() for path in self.results)

    def sbatch(self, dependencies: tuple[str, ...]) -> list[str]:
        """The command that submits it."""
        config, count = self.config, self.config.shares or len(self.config.each)
        limit = f"%{config.at_once}" if config.at_once else ""
        return [
            *("sbatch", "--parsable", f"--job-name={self.job_name}", f"--nodes={config.nodes}"),
            *([f"--array=0-{count - 1}{limit}"] if count else []),
            *([f"--dependency=afterok:{':'.join(dependencies)}", "--kill-on-invalid-dep=yes"] if dependencies else []),
            *config.options,
            *(f"slurm/{config.script}.sbatch", str(config.config), *config.keys),
            *(["--each", *config.each] if config.each else []),
        ]


def load_stages(file: Path, overrides: list[str]) -> list[Stage]:
    """Read a pipeline; raises ValueError with one line per fault, also of the configurations that it names."""
    pipeline = load_config(PipelineConfig, file, overrides)
    if faults := pipeline_faults(pipeline):
        raise FaultsError(faults)
    mark = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:6]  # another clone's pipeline has other jobs
    stages: list[Stage] = []
    for name, config in pipeline.stages.items():
        after = config.after if config.after is not None else tuple(stage.name for stage in stages[-1:])
        stages.append(Stage(name, f"{file.stem}-{name}-{mark}", config, _results(config), after))
    if unknown := [stage.name for stage in stages if not stage.results]:
        raise FaultsError(
            f"stages.{name}: its checkpoint.export=[] leaves no model that says that it is done; name a kind such as hf"
            for name in unknown
        )
    return stages


def submit(stages: list[Stage], *, dry_run: bool) -> Iterator[str]:
    """Submit what is missing; yields a line per stage, or the command where nothing is to be done yet."""
    jobs = {} if dry_run else queued_jobs()
    ids: dict[str, str] = {}
    for stage in stages:
        if stage.is_done:
            yield f"{stage.name}: done"
            continue
        if stage.job_name in jobs:
            ids[stage.name], state = jobs[stage.job_name]
            yield f"{stage.name}: job {ids[stage.name]} is {state}"
            continue
        command = stage.sbatch(tuple(ids[name] for name in stage.after if name in ids))
        if dry_run:
            ids[stage.name] = _DRY_ID.format(stage.name)
            yield shlex.join(command)
            continue
        ids[stage.name] = _slurm(*command).partition(";")[0]
        yield f"{stage.name}: submitted as job {ids[stage.name]}"


def show(stages: list[Stage]) -> Iterator[str]:
    """A line per stage: done, in the queue, or neither."""
    jobs = queued_jobs()
    for stage in stages:
        job, state = jobs.get(stage.job_name, ("", "not submitted, or ended without its result"))
        yield f"{stage.name}: {'done' if stage.is_done else f'job {job} is {state}' if job else state}"


def queued_jobs() -> Mapping[str, tuple[str, str]]:
    """Id and state of the user's waiting and running jobs, by name."""
    lines = _slurm("squeue", "--noheader", "--me", "--format=%F %T %j").splitlines()
    return {name: (job, state) for job, state, name in (line.split(" ", 2) for line in lines)}


def _results(stage: StageConfig) -> tuple[Path, ...]:
    command = _COMMANDS.get(stage.script, stage.script)
    if command == "train" and has_section(stage.config, list(stage.keys), "verifier"):
        command = "rlvr"
    config = load_config(COMMANDS[command].config_class, stage.config, list(stage.keys))
    assert isinstance(config, JobConfig), "every script runs a command on ranks"
    if isinstance(config, ScoreConfig):
        return (config.output,)
    if isinstance(config, CollectConfig):
        folder = "unscored" if config.student is None else "scored"
        folder = folder if config.control == "none" else f"control_{config.control}"
        return (config.output_dir / folder / f"sft_{config.selection.name}.jsonl",)
    if isinstance(config, EvaluateConfig):
        folders = [config.output_dir / folder_of(choice) for choice in stage.each] or [config.output_dir]
        return tuple(folder / "results.json" for folder in folders)
    assert isinstance(config, RlConfig | SftConfig), "the others train a model"
    return tuple(config.output_dir / kind for kind in config.checkpoint.export)


def folder_of(choice: str) -> str:
    """The folder that `evaluate.sbatch` gives a choice of `each`."""
    return re.sub(r"[^A-Za-z0-9.]", "-", choice)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]}: not found; call this on a login node of a cluster with Slurm") from error
    if done.returncode != 0:
        raise ValueError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
