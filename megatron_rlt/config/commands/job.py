"""What every command's configuration offers: its models, the check before anything loads, and a plan.

Everything that can be known to be wrong is found before a model loads or torch is imported, all of it at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.description import architecture_in
from megatron_rlt.config.model_files import model_faults, vocabulary_faults
from megatron_rlt.config.models import ModelConfig, Shapes, layout_faults, models_fp8_faults
from megatron_rlt.config.paths import folder_faults
from megatron_rlt.config.plan import Plan
from megatron_rlt.config.section import (
    Count,
    FilePath,
    PositiveFloat,
    Seconds,
    Section,
)
from megatron_rlt.given_files import FaultsError

AnswerKind = Literal["math", "choice", "countdown", "exact"]


class CommandConfig(Section):
    """The configuration of one command. Its docstring is the command's help."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models it runs, by the name of their section."""
        return {}

    def path_faults(self) -> list[str]:
        """One line per broken rule about the files and folders it names, models left aside."""
        return []

    def written_files(self) -> tuple[Path, ...]:
        """What it writes outside its run folder: files, or a folder that appears whole."""
        return ()

    def faults(self, shapes: Shapes) -> list[str]:  # noqa: ARG002 - for commands with models
        """One line per broken rule between its sections, and between them and its models."""
        return []

    def plan(self, shapes: Shapes) -> Plan:  # noqa: ARG002
        """Every number that follows from it; it must break no rule."""
        return Plan((), ())

    def check(self) -> Shapes:
        """Read what its models are from their folders; raises ValueError with one line per broken rule."""
        shapes: dict[str, Architecture] = {}
        unreadable = []
        for name, model in self.models.items():
            if model.model.is_dir():  # `model_faults` names a folder that is missing
                try:
                    shapes[name] = architecture_in(model.model)
                except ValueError as error:
                    unreadable.append(f"{name}.model: {error}")
        vocabularies = vocabulary_faults(self.models, shapes)
        faults = [
            *model_faults(self.models),
            *self.path_faults(),
            *unreadable,
            *vocabularies,
            *self.faults(shapes),
        ]
        if faults:
            raise FaultsError(faults)
        return shapes


class MetricsConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (package `wandb`); offline unless WANDB_MODE says otherwise."""
    progress: bool = True
    """Show a live progress display on a terminal."""
    peak_flops_per_second: PositiveFloat | None = None
    """Peak FLOP/s of one device, for the metric `peak_share`. None: the dense bfloat16 peak of a known GPU, else no
    share."""
    store_completions: bool = True
    """Write `completions/step-N.parquet` with every completion and all terms of its reward."""


class WatchdogConfig(Section):
    """How a hanging rank is found."""

    timeout_seconds: Seconds = 1800.0
    """Longest time without progress on a rank, in seconds; then its stacks are written and the job ends."""


class JobConfig(CommandConfig):
    """Keys of every command that runs a model."""

    output_dir: FilePath
    """Run folder for configuration, checkpoints, metrics, completions; starting again on it resumes the run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and initialisation."""
    world_size: Count = 1
    """Ranks to start where no launcher did; under torchrun or srun it must equal the number they started."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """How hanging ranks are found."""
    metrics: MetricsConfig = MetricsConfig()
    """Where metrics go."""

    def path_faults(self) -> list[str]:
        faults = folder_faults("output_dir", self.output_dir)
        if self.metrics.wandb and find_spec("wandb") is None:
            faults.append("metrics.wandb=true: needs the package `wandb`; pip install 'megatron-rlt[wandb]'")
        return faults

    def faults(self, shapes: Shapes) -> list[str]:
        return [*layout_faults(self.models, shapes, self.world_size), *models_fp8_faults(self.models, shapes)]
