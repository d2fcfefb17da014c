"""The configuration of each command: which sections it takes, and what they imply as plain numbers."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.config.rollout import RolloutConfig
from megatron_rlt.config.sections import (
    AnswerSamplingConfig,
    CheckpointConfig,
    CountdownConfig,
    DataConfig,
    GrpoConfig,
    MetricsConfig,
    ModelConfig,
    NonEmptyText,
    OptimizerConfig,
    Placebo,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    RewardConfig,
    ScoringConfig,
    Section,
    StudentsConfig,
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


class TrainConfig(RlConfig):
    """`megatron-rlt train`: RL of a teacher with the RLT reward."""

    policy_name: ClassVar[str] = "teacher"

    teacher: ModelConfig
    """The policy: it is trained."""
    student: ModelConfig
    """The frozen model whose predictions are the reward; the word `self` takes the teacher's section, that is its own
    frozen start."""
    students: StudentsConfig = StudentsConfig()
    """Further students, and what becomes of several rewards."""
    temperature: PositiveFloat = 0.7
    """Of sampling and of every log-prob: teacher, student, reference."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""

    @model_validator(mode="before")
    @classmethod
    def _read_self(cls, values: object) -> object:
        """`student: self` is the teacher's section: its folder holds the start, also when a run resumes."""
        if isinstance(values, dict) and values.get("student") == "self" and "teacher" in values:
            return {**values, "student": values["teacher"]}
        return values

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The teacher and all students."""
        extra = {f"students.extra.{name}": model for name, model in self.students.extra.items()}
        return {"teacher": self.teacher, "student": self.student} | extra


class EvaluationLossConfig(Section):
    """Loss on rows that are not trained on."""

    data: Path
    """Held-out rows with question, solution and reasoning_trace: shards written by `prepare`, or one file of rows."""
    interval_steps: PositiveInt = 25
    """Steps between evaluations; the last step is always evaluated."""


class SftConfig(JobConfig):
    """`megatron-rlt sft`: supervised training of one model on rows with a `reasoning_trace`."""

    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Rows with question, solution and reasoning_trace."""
    evaluation: EvaluationLossConfig | None = None
    """Loss on held-out rows, logged as evaluation_loss; None: not evaluated. Training does not depend on it."""
    role: Literal["teacher", "student"] = "teacher"
    """Sequence format: the teacher's (loss on the explanation) or the student's (loss on explanation and solution)."""
    loss_on: Literal["explanation_and_solution", "assistant_turn"] = "explanation_and_solution"
    """Student's tokens in the loss: from the explanation's first to the end of turn, or also the tag that opens it."""
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
    placebo: Placebo = "none"
    """Scored in an explanation's place: another question's, its tokens shuffled, or nothing; none: no such control."""
    baseline: bool = True
    """Also ask the student for each solution without an explanation, once a question and part; gives the gain."""


class ReweighConfig(Section):
    """`megatron-rlt reweigh`: rewards that were stored with their log-probs, computed again, without a model."""

    source: Path
    """Parquet file of `score` or `collect`, or the run folder of a `train` with completions/step-N.parquet."""
    output: Path | None = None
    """Parquet file to write, rows in the source's order; None: only the table is printed."""
    reward: RewardConfig = RewardConfig()
    """RLT reward; what is not named stays as it was when the source was made, whatever the defaults are."""


AnswerKind = Literal["math", "choice", "countdown", "exact"]


class QuestionColumnConfig(Section):
    """Names of the columns of questions whose answers can be checked."""

    question: str = "question"
    """Column of the question; countdown rows may do without."""
    answer: str = "answer"
    """Column of the reference answer; countdown rows may do without."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    choices: str = "choices"
    """Column of a list of choices (kind choice); where absent, the question states them itself."""
    wrong_answers: tuple[str, ...] = ()
    """Columns of wrong choices (kind choice), shuffled with `answer` in an order that depends on the question alone."""
    numbers: str = "numbers"
    """Column of a list of numbers (kind countdown), from which and `target` a question is made where there is none."""
    target: str = "target"
    """Column of the target (kind countdown)."""


class EvaluateConfig(JobConfig):
    """`megatron-rlt evaluate`: how often a model answers questions rightly."""

    model: ModelConfig
    """The model that answers."""
    data: NonEmptyText
    """A .jsonl or .parquet file, hf://NAME[/CONFIGURATION][:SPLIT], aime24, math500, gpqa-diamond, countdown:N:SEED."""
    kind: AnswerKind | None = None
    """How answers are judged: math (math-verify), choice (a letter), countdown (exact arithmetic), exact (words)."""
    columns: QuestionColumnConfig = QuestionColumnConfig()
    """Column names of a file or hub data set."""
    countdown: CountdownConfig = CountdownConfig()
    """Size of generated countdown problems."""
    question_template: NonEmptyText | None = None
    """The user's turn with `{question}` where the question goes; None takes the set's own, `{question}` for a file."""
    prefill_thought: bool = True
    """End the prompt with the thought's opening tag, as models trained by `sft` expect; False for other models."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompt, prompt length."""
    sampling: AnswerSamplingConfig = AnswerSamplingConfig()
    """Sampling of answers."""
    judge_timeout_seconds: PositiveFloat = 5.0
    """Processor time for one comparison by math-verify; an answer that takes longer is wrong."""
    questions_per_part: PositiveInt = 64
    """Questions answered between two saves; a run started again continues after the last save."""


class SelectionConfig(Section):
    """Which explanations of a question become training rows."""

    rule: Literal["first", "best_of_n", "fits", "all"] = "first"
    """One a question: the first, the best by reward, or the best that fits max_student_tokens; or all of them."""
    max_student_tokens: PositiveInt | None = None
    """For `fits`: longest student sequence (prompt, explanation, solution); where none fits, the best by reward."""
    malformed: Literal["last_resort", "never", "allowed"] = "last_resort"
    """Malformed explanations may be chosen: only where a question has no well-formed one, never, or like all others."""

    @property
    def name(self) -> str:
        """The selection in a few words that can be part of a file's name; another selection has another one."""
        words: list[str] = [self.rule]
        if self.max_student_tokens is not None:
            words.append(str(self.max_student_tokens))
        if self.malformed != "last_resort":
            words.append(f"malformed_{self.malformed}")
        return "_".join(words)


class CollectConfig(JobConfig):
    """`megatron-rlt collect`: a teacher's explanations of a data set, scored by a student if one is given."""

    teacher: ModelConfig
    """The model that explains: a Hugging Face folder, such as `hf/` of a training run."""
    teacher_checkpoint: Path | None = None
    """A run's `checkpoints/step-N` whose weights replace those of teacher.model, the folder that run began with."""
    student: ModelConfig | None = None
    """The frozen model whose predictions are the reward; None: explanations are collected without scores."""
    data: Path
    """Questions and solutions: folder of shards written by `prepare`, or one JSONL or Parquet file."""
    num_explanations: PositiveInt = 1
    """Explanations sampled for each question."""
    questions_per_part: PositiveInt = 256
    """Questions between two saves; a run started again continues after the last save."""
    temperature: PositiveFloat = 0.7
    """Of sampling and of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes of teacher and student."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    placebo: Placebo = "none"
    """Scored in an explanation's place: another question's, its tokens shuffled, or nothing; none: no such control."""
    selection: SelectionConfig = SelectionConfig()
    """Which explanations become training rows; may change on a collection that is there already."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models it runs, by their section's name."""
        return {"teacher": self.teacher} | ({} if self.student is None else {"student": self.student})


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
