"""The configuration of each command: which sections it takes, and what they imply as plain numbers."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.config.rollout import RolloutConfig
from megatron_rlt.config.sections import (
    CheckpointConfig,
    DataConfig,
    GrpoConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    PositiveInt,
    PromptConfig,
    ScoringConfig,
    Section,
    WatchdogConfig,
)


class JobConfig(Section):
    """What every command that runs a model has."""

    output_dir: Path
    """Run folder: configuration, checkpoints, metrics, completions; a run started again on it resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and initialisation."""
    world_size: PositiveInt = 1
    """Ranks to start when no launcher did; under torchrun or srun it must equal what they started."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Finding ranks that hang."""
    metrics: MetricsConfig = MetricsConfig()
    """Where numbers go."""


class RlConfig(JobConfig):
    """What every RL job has; which model is trained and where rewards come from is the subclass's."""

    policy_name: ClassVar[str]
    """Section of the model that is trained."""

    data: DataConfig
    """Questions and solutions."""
    num_steps: PositiveInt = 125
    """RL steps (batches of completions)."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes without gradient."""
    grpo: GrpoConfig = GrpoConfig()
    """Advantages, loss, batch sizes."""
    mismatch: MismatchConfig = MismatchConfig()
    """Sampling engine against trainer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""

    @property
    @abstractmethod
    def models(self) -> dict[str, ModelConfig]:
        """The models it runs, by their section's name."""


AnswerKind = Literal["math", "choice", "countdown", "exact"]
