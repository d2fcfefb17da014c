"""The RLT reward: its coefficients, penalties, leak detectors, and the control that is scored instead."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Control = Literal["none", "other_question", "shuffled", "no_explanation"]


class PenaltyConfig(Section):
    """Added to the reward of an explanation with the named fault; several penalties add up."""

    missing_end_tag: float = -1.0
    """The explanation has no end tag (the paper's code: -1)."""
    text_after_end_tag: float = 0.0
    """Text stands between the end tag and the end-of-turn token."""
    empty: float = 0.0
    """Nothing stands before the end tag."""
    contains_tags: float = 0.0
    """The explanation contains a tag of the teacher's or the student's format."""
    truncated: float = 0.0
    """The completion ended because its token budget ran out."""


class LeakConfig(Section):
    """Leak detectors. Each adds weight x metric to the reward: negative weights punish, weight 0 only logs."""

    solution_overlap: float = 0.0
    """Weight of the share of the solution's n-grams that the explanation contains."""
    states_the_answer: float = 0.0
    r"""Weight of stating the answer in the solution's \boxed{} before the explanation's closing share."""
    repetition: float = 0.0
    """Weight of the share of the explanation's n-grams that repeat earlier ones."""
    epistemic_per_100_words: float = 0.0
    """Weight of the number of epistemic markers ("wait", "perhaps") per 100 words."""
    ngram: PositiveInt = 4
    """Words per n-gram."""
    closing_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the explanation's words, at its end, in which the answer may stand as a conclusion."""


class RewardConfig(Section):
    """RLT reward: r = r_SS - lambda_kl * r_KL, each a mean plus alpha times its worst token (paper, section 3)."""

    alpha: NonNegativeFloat = 0.01
    """Weight of the worst token (minimum of r_SS, maximum of r_KL) beside the mean."""
    lambda_kl: NonNegativeFloat = 3.0
    """Weight of r_KL against r_SS."""
    kl_estimator: Literal["k1", "k3", "full"] = "k1"
    """Per-token KL(teacher || student): log-ratio of the sampled token, its k3 form, or the sum over the vocabulary."""
    solution_unit: Literal["logprob", "probability", "gain"] = "logprob"
    """Unit of r_SS: log-prob per token (the paper), probability, or log-prob gained over no explanation (one more
    forward pass of the student per question)."""
    penalties: PenaltyConfig = PenaltyConfig()
    """Penalties for malformed explanations."""
    leaks: LeakConfig = LeakConfig()
    """What the leak detectors count, and what it costs."""


def _noise(value: object) -> object:
    """A union's own complaint would name each of its members in a line."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    if value != "auto" and not is_number:
        raise ValueError("must be auto, a number above 0 in units of the reward, or null")
    return value


class TrainRewardConfig(RewardConfig):
    """The RLT reward, and which of its differences are large enough to train on."""

    noise_floor: Annotated[Literal["auto"] | float, BeforeValidator(_noise)] | None = None
    """Noise of the students' scores: the standard deviation of a reward's error within a group, as `tools.bench.fp8`
    measures it, or auto: measured in the first step. Groups whose rewards differ less than noise_floor_factor times as
    much get advantages 0; None: all groups count."""
    noise_floor_factor: PositiveFloat = 2.0
    """Standard deviation of a group's rewards, in multiples of the noise, below which it teaches nothing. At 2 noise
    is a quarter of the variance, and 8 equally good explanations pass for different ones in 1 of 4,500 groups."""

    @property
    def of_one_explanation(self) -> RewardConfig:
        """What the reward of a single explanation follows from."""
        return RewardConfig(**{name: dict(self)[name] for name in RewardConfig.model_fields})

    def faults(self) -> list[str]:
        """Keys that have no effect."""
        if (
            self.noise_floor is None
            and self.noise_floor_factor != type(self).model_fields["noise_floor_factor"].default
        ):
            return [
                f"reward.noise_floor_factor={self.noise_floor_factor:g}: has no effect with noise_floor=null; set"
                " reward.noise_floor=auto, or leave it out"
            ]
        return []


class StudentsConfig(Section):
    """Further students beside `student`. Each reads every explanation in its own format and layout, and rewards it."""

    extra: Annotated[dict[str, ModelConfig], Field(min_length=1)]
    """Frozen models by a name of their own. All need the teacher's tokenizer, or reward.lambda_kl 0."""
    reduction: Literal["mean", "minimum"] = "mean"
    """How the students' rewards become one; a held-out student's reward is left out."""
    held_out: str | None = None
    """Student (`student`, or a name in extra) whose reward is only logged; None: all count."""
