"""The configuration of each command: which sections it takes, and what they imply as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_rlt.config.sections import (
    CheckpointConfig,
    DataConfig,
    GrpoConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
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


class TrainConfig(JobConfig):
    """`megatron-rlt train`: RL of a teacher with the RLT reward."""

    teacher: ModelConfig
    """The policy: it is trained."""
    student: ModelConfig
    """The frozen model whose predictions are the reward."""
    data: DataConfig
    """Questions and solutions."""
    num_steps: PositiveInt = 125
    """RL steps (batches of completions)."""
    temperature: PositiveFloat = 0.7
    """Of sampling and of every log-prob: teacher, student, reference."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes without gradient."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    grpo: GrpoConfig = GrpoConfig()
    """Advantages, loss, batch sizes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""


class SftConfig(JobConfig):
    """`megatron-rlt sft`: supervised training of one model on rows with a `reasoning_trace`."""

    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Rows with question, solution and reasoning_trace."""
    role: Literal["teacher", "student"] = "teacher"
    """Sequence format: the teacher's (loss on the explanation) or the student's (loss on explanation and solution)."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    max_tokens: PositiveInt = 16384
    """Longest whole sequence; a longer row is rejected by name."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; None derives them from num_epochs."""
    num_epochs: PositiveFloat = 10.0
    """Passes over the data when num_steps is None."""
    global_batch_size: PositiveInt = 16
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Most rows packed into one forward-backward pass."""
    scoring: ScoringConfig = ScoringConfig()
    """Block sizes of the output layer."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-5, schedule="cosine", warmup_fraction=0.05, beta2=0.95, weight_decay=1e-4
    )
    """AdamW and its schedule; the defaults are the paper's warm-up."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""


class ScoreConfig(JobConfig):
    """`megatron-rlt score`: the RLT reward of explanations that already exist."""

    teacher: ModelConfig
    """The model whose distribution r_KL compares with the student's."""
    student: ModelConfig
    """The frozen model whose predictions are the reward."""
    input: Path
    """JSONL or Parquet with id, question, solution, explanation."""
    output: Path
    """Parquet file to write, rows in the input's order."""
    rows_per_part: PositiveInt = 256
    """Rows scored between two saves; a run started again continues after the last save."""
    temperature: PositiveFloat = 0.7
    """Of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    scoring: ScoringConfig = ScoringConfig()
    """Packing and block sizes."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""


class ColumnConfig(Section):
    """Names of the columns of the source rows."""

    question: str = "question"
    """Column of the question."""
    solution: str = "solution"
    """Column of the whole solution section."""
    reasoning_trace: str = "reasoning_trace"
    """Column of an existing explanation; may be absent."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    conversations: str = "conversations"
    """Column of Bespoke-Stratos-like turns, read where the question column is absent."""


class PrepareConfig(Section):
    """`megatron-rlt prepare`: rows to webdataset shards."""

    input: tuple[str, ...]
    """JSONL or Parquet files, or one `hf://name[:split]` data set of the Hugging Face hub."""
    output_dir: Path
    """Folder of the shards; must not hold another data set."""
    columns: ColumnConfig = ColumnConfig()
    """Column names."""
    rows_per_shard: PositiveInt = 1000
    """Rows in one shard."""
    max_characters: PositiveInt = 400_000
    """Longest question, solution or trace; a longer row is rejected by name."""
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of rejected rows above which nothing is written; 1.0 accepts any share below all."""
