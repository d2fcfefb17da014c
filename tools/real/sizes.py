"""How large `make real` is: steps, questions and answers of each size, and what they take on two quiet cores."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_SFT_STEP = 16  # configs/real/scorer_2cpu_dp2.yaml and its like


@dataclass(frozen=True)
class Size:
    """How much of everything; what is not named here stands in the configurations."""

    scorer_steps: int
    warmup_steps: int
    rl_steps: int
    questions_per_step: int
    group_size: int
    num_explained: int  # questions that students are distilled on
    student_steps: int
    num_asked: int  # held-out questions that teachers explain and students answer
    num_samples: int  # sampled answers to each, besides a greedy one


SIZES = {
    "small": Size(
        scorer_steps=16,
        warmup_steps=8,
        rl_steps=12,
        questions_per_step=4,
        group_size=6,
        num_explained=128,
        student_steps=8,
        num_asked=48,
        num_samples=2,
    ),
    "full": Size(
        scorer_steps=32,
        warmup_steps=16,
        rl_steps=30,
        questions_per_step=4,
        group_size=10,
        num_explained=512,
        student_steps=32,
        num_asked=150,
        num_samples=4,
    ),
}

START = 15.0
"""Seconds until a command has loaded its models and after its last step, until it has saved."""
SFT_ROW, RL_COMPLETION, EXPLANATION, REWARD, CONTROL, ANSWER = 1.0, 2.6, 0.55, 1.05, 0.85, 0.55
"""Seconds per row trained on, completion of RL (sampled, scored and trained on), explanation, reward with what the
student knows without it, reward of a control, and answer, in float32 on two quiet cores."""


def sft_seconds(num_steps: int) -> int:
    """Expected seconds of supervised training."""
    return round(START + SFT_ROW * ROWS_PER_SFT_STEP * num_steps)


def each_seconds(count: int, seconds: float) -> int:
    """Expected seconds of a command that takes so many for each of `count` texts."""
    return round(START + count * seconds)
