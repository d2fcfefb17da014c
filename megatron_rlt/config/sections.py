"""The sections a run's configuration is built from; every default of the project stands here, once.

Importable without torch. Rules inside one section are validators here; rules across sections and rules that
need a model's `config.json` stand in `rules.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]


NonNegativeInt = Annotated[int, Field(ge=0)]


PositiveFloat = Annotated[float, Field(gt=0)]


NonNegativeFloat = Annotated[float, Field(ge=0)]


Fraction = Annotated[float, Field(gt=0, le=1)]


NonEmptyText = Annotated[str, Field(pattern=r"\S")]


Placebo = Literal["none", "other_question", "shuffled", "no_explanation"]


class Section(BaseModel):
    """A part of the configuration tree: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LayoutConfig(Section):
    """How one model is split over the ranks; what tp x pp x cp leaves over is data parallel."""

    tp: PositiveInt = 1
    """Tensor-parallel size: ranks that share every layer."""
    pp: PositiveInt = 1
    """Pipeline-parallel size: stages the layers are split into."""
    sp: bool = False
    """Sequence parallelism: activations between layers are split over the tensor-parallel ranks; needs tp > 1."""
    cp: PositiveInt = 1
    """Context-parallel size: ranks that share the tokens of every sequence. Sampling takes them as further replicas."""


class ModelConfig(Section):
    """A model on disk and how it runs here."""

    model: Path
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; sums over tokens and log-sum-exp are float32 in any case."""
    layout: LayoutConfig = LayoutConfig()
    """Parallel layout of this model; teacher and student may differ."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention only, or every layer."""
    residency: Literal["resident", "host"] = "resident"
    """Where a frozen model's weights are between its turns: on the device, or in host memory, from where they move."""


class DataConfig(Section):
    """Where training rows come from and in which order."""

    path: Path
    """Folder of webdataset shards written by `prepare`, or one JSONL file (sharded into the run folder first)."""
    shuffle_buffer_size: PositiveInt = 4096
    """Rows held per rank for shuffling; 1 reads in shard order."""
    num_workers: NonNegativeInt = 0
    """Loader processes per rank; 0 reads in the trainer's own process."""


class TagsConfig(Section):
    """A tag set of one's own; the closing tags of thought and solution may be empty, the others may not."""

    thought_open: NonEmptyText
    """Before the explanation in the student's text."""
    thought_close: str = ""
    """After the explanation in the student's text."""
    solution_open: NonEmptyText
    """Before the solution, in the teacher's and the student's text."""
    solution_close: str = ""
    """After the solution, in the teacher's and the student's text."""
    explanation_open: NonEmptyText
    """Ends the teacher's prompt: its explanation begins here."""
    explanation_close: NonEmptyText
    """The end tag that the teacher writes."""
    separator: str = "\n\n"
    """Between the parts: after a close tag and around the teacher's explanation."""


class PromptConfig(Section):
    """Texts around question, solution and explanation."""

    tags: Literal["stratos", "r1"] = "stratos"
    """Tag set: `stratos` writes <|begin_of_thought|>, `r1` writes <think>."""
    custom_tags: TagsConfig | None = None
    """Tag set of one's own; None takes the one named by `tags`."""
    teacher_system: str | None = None
    """The teacher's system prompt; None takes the tag set's own, an empty string sends none."""
    student_system: str | None = None
    """The student's system prompt; None takes the tag set's own, an empty string sends none."""
    max_prompt_tokens: PositiveInt = 16384
    """Longest prompt in tokens (the teacher's; in `evaluate` the student's); a longer row is rejected by name."""


class AnswerSamplingConfig(Section):
    """How a student's answers are sampled; they end with its turn."""

    greedy: bool = False
    """One answer of most probable tokens; num_samples must be 1, temperature and top_p are not used."""
    num_samples: PositiveInt = 1
    """Answers to each question: the k of avg@k, maj@k and pass@k."""
    temperature: PositiveFloat = 0.7
    """Sampling temperature."""
    top_p: Fraction = 1.0
    """Nucleus mass kept at each step; 1.0 samples from the whole distribution."""
    max_completion_tokens: PositiveInt = 16384
    """Longest answer in tokens, thought and end of turn included; a longer one counts as truncated."""
    max_batch_size: PositiveInt = 256
    """Answers decoded together on one data-parallel rank."""
    max_prefill_tokens: PositiveInt = 16384
    """Prompt tokens, padding included, that go through the model together; a longer prompt goes alone."""


class CountdownConfig(Section):
    """Problems that `countdown:N:SEED` generates: reach a target from given numbers by + - * /."""

    num_numbers: Annotated[int, Field(ge=2, le=8)] = 4
    """Numbers in a problem."""
    largest_number: PositiveInt = 99
    """Numbers are drawn from 1 to this one."""
    smallest_target: PositiveInt = 10
    """Smallest target."""
    largest_target: PositiveInt = 100
    """Largest target."""
    use_all: bool = True
    """Every number must be used exactly once; False: at most once."""


class ScoringConfig(Section):
    """How frozen models (student, reference) and the old policy are asked for log-probs."""

    max_tokens_per_pack: PositiveInt = 16384
    """Token budget of one packed forward pass; a longer sequence is a pack of its own."""
    vocab_block: PositiveInt = 1024
    """Vocabulary entries whose logits exist at one time."""
    row_block: PositiveInt = 1024
    """Rows (wanted tokens) whose logits exist at one time."""


class PenaltyConfig(Section):
    """Added to the reward when an explanation has the flag; several add up."""

    missing_end_tag: float = -1.0
    """No end tag was sampled (the paper's code: -1)."""
    text_after_end_tag: float = 0.0
    """Text between the end tag and the end of turn."""
    empty: float = 0.0
    """Nothing before the end tag."""
    contains_tags: float = 0.0
    """A tag of the teacher's or the student's format inside the explanation."""
    truncated: float = 0.0
    """The completion ended because its token budget ran out."""


class LeakConfig(Section):
    """Signs counted in every explanation; a weight adds weight x metric to the reward, so negative ones punish."""

    solution_overlap: float = 0.0
    """Weight of the share of the solution's n-grams that stand in the explanation; 0 only logs."""
    states_the_answer: float = 0.0
    r"""Weight where the answer in the solution's \boxed{} stands before the explanation's closing part; 0 only logs."""
    repetition: float = 0.0
    """Weight of the share of the explanation's n-grams that stood in it before; 0 only logs."""
    epistemic_per_100_words: float = 0.0
    """Weight of the number of epistemic markers ("wait", "perhaps") in 100 words; 0 only logs."""
    ngram: PositiveInt = 4
    """Words in an n-gram."""
    closing_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the explanation's words, at its end, in which the answer may stand as a conclusion."""


class RewardConfig(Section):
    """RLT reward: r = r_SS - lambda_kl * r_KL, each a mean plus alpha times its worst token (paper, section 3)."""

    alpha: NonNegativeFloat = 0.01
    """Weight of the worst token (min of r_SS, max of r_KL) beside the mean."""
    lambda_kl: NonNegativeFloat = 3.0
    """Weight of r_KL against r_SS."""
    kl_estimator: Literal["k1", "k3", "full"] = "k1"
    """Per-token KL(teacher || student): log-ratio of the sampled token, its k3 form, or the sum over the vocabulary."""
    solution_unit: Literal["logprob", "probability", "gain"] = "logprob"
    """Unit of r_SS: log-prob a token (the paper), probability, or log-prob gained over no explanation (one more pass of
    the student for each problem)."""
    penalties: PenaltyConfig = PenaltyConfig()
    """Penalties for malformed explanations."""
    leaks: LeakConfig = LeakConfig()
    """Leak detectors: what they count, and what it costs."""


class StudentsConfig(Section):
    """More students than one: each reads every explanation in its own format and layout, and rewards it."""

    extra: dict[str, ModelConfig] = {}
    """Frozen models beside `student`, by a name of their own; all need the teacher's tokenizer, or lambda_kl 0."""
    reduction: Literal["mean", "minimum"] = "mean"
    """What becomes of the rewards of those that are not held out."""
    held_out: str | None = None
    """The student (`student`, or a name of extra) whose reward is only logged; None: all count."""


class GrpoConfig(Section):
    """Group-relative policy optimisation; the defaults are the paper's."""

    questions_per_step: PositiveInt = 16
    """Questions drawn for one step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 64
    """Completions sampled for each question."""
    micro_batch_size: PositiveInt = 1
    """Most completions packed into one forward-backward pass."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps taken on one step's completions, each on an equal part of the groups."""
    clip_low: PositiveFloat | None = None
    """Ratio clipped below at 1 - clip_low; None: not clipped."""
    clip_high: PositiveFloat | None = None
    """Ratio clipped above at 1 + clip_high; None: not clipped."""
    beta: NonNegativeFloat = 0.04
    """Weight of the k3 KL to the reference in the loss; 0 keeps no reference model."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """Loss over tokens: mean per completion then over completions (paper), over all tokens of the batch (DAPO), or
    sum per completion over the token budget (Dr.GRPO, with normalize_std false)."""
    mask_truncated: bool = False
    """Leave completions that ran out of tokens out of the loss (DAPO); they still count in their group's mean."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation."""
    std_epsilon: PositiveFloat = 1e-4
    """Added to the standard deviation before dividing."""
    reference_sync_steps: PositiveInt | None = 32
    """Steps between mixing the policy into the reference; None: never."""
    reference_mix: Fraction = 0.9
    """Share of the policy when it is mixed into the reference."""
    reference_residency: Literal["resident", "host"] = "resident"
    """Where the reference's weights are between its turns: on the device, or in host memory."""


class OptimizerConfig(Section):
    """AdamW on Megatron's distributed optimizer."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all optimizer steps in which the rate rises from 0."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    clip_grad: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    max_skipped_steps: PositiveInt = 5
    """Steps in a row with a non-finite gradient after which the run stops."""


class CheckpointConfig(Section):
    """When training state is saved and how much of it is kept."""

    interval_steps: PositiveInt = 25
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; older ones are removed after a newer one is complete."""
    export_hf: bool = True
    """Write the final weights as a Hugging Face folder (`hf/` in the run folder)."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """Largest safetensors file of that folder."""


class MetricsConfig(Section):
    """Where numbers go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (package `wandb`; offline unless WANDB_MODE says otherwise)."""
    progress: bool = True
    """Show a live progress display on a terminal."""
    peak_flops_per_second: PositiveFloat | None = None
    """Peak of one device in FLOP/s, for `peak_share`; null: of a known GPU its dense bfloat16 peak, else no share."""
    store_completions: bool = True
    """Write `completions/step-N.parquet` with every completion and all parts of its reward."""


class WatchdogConfig(Section):
    """How a rank that hangs is found."""

    timeout_seconds: PositiveFloat = 1800.0
    """Longest time without progress on a rank before its stacks are written and the job ends."""
