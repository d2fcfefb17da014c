"""A chain of jobs on a cluster: which script with which configuration, on how many nodes, after which other stage."""

from __future__ import annotations

from typing import Literal

from megatron_rlt.config.section import FilePath, NonEmptyText, PositiveInt, Section


class StageConfig(Section):
    """One job, or one array of jobs."""

    script: Literal["sft", "train_rlt", "collect", "score", "evaluate"]
    """The script of `slurm/` that runs it."""
    config: FilePath
    """The command's configuration."""
    keys: tuple[NonEmptyText, ...] = ()
    """Keys that win over the file, such as `num_steps=20`."""
    nodes: PositiveInt = 1
    """Nodes of the job, or of each task of an array."""
    shares: PositiveInt | None = None
    """Of `collect`: an array of so many tasks, each of which explains a share of the questions."""
    each: tuple[NonEmptyText, ...] = ()
    """Of `evaluate`: an array with a task per entry, which is its keys, such as `data=math500`."""
    at_once: PositiveInt | None = None
    """Tasks of an array that run at once, at most; None: as many as there is room for."""
    after: tuple[NonEmptyText, ...] | None = None
    """Stages that must have ended well; None: the one before."""
    options: tuple[NonEmptyText, ...] = ()
    """Further options of sbatch, such as `--time=48:00:00`."""


class PipelineConfig(Section):
    """Stages by name, in their order."""

    stages: dict[str, StageConfig]
    """The stages; a stage that is done, waits or runs is not submitted again."""


def pipeline_faults(pipeline: PipelineConfig) -> list[str]:
    """One line per broken rule."""
    faults: list[str] = []
    earlier: list[str] = []
    for name, stage in pipeline.stages.items():
        place = f"stages.{name}"
        if not stage.config.is_file():
            faults.append(f"{place}.config: {stage.config} is no file; give a YAML file of the command")
        if stage.shares is not None and stage.script != "collect":
            faults.append(f"{place}.shares={stage.shares}: only collect has shares; leave it out")
        if stage.each and stage.script != "evaluate":
            faults.append(f"{place}.each: only evaluate takes several; leave it out")
        if stage.at_once is not None and stage.shares is None and not stage.each:
            faults.append(f"{place}.at_once={stage.at_once}: has no effect on a single job; leave it out")
        for other in stage.after or ():
            if other not in earlier:
                before = ", ".join(earlier) or "none"
                faults.append(f"{place}.after: {other} does not stand before this stage; stages before it: {before}")
        earlier.append(name)
    return faults
