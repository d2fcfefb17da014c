"""One completion of a training step with made-up log-probs."""

from __future__ import annotations

import math

import torch

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.types import (
    Completion,
    FinishReason,
    FormatFlag,
    LeakMetrics,
    Problem,
    Prompt,
    RewardEvidence,
    ScoredExplanation,
    ScoringPair,
    Span,
    SpannedSequence,
    StudentScores,
)


def completion_of(index: int, config: TrainConfig) -> ScoredExplanation:
    """One completion of seven tokens, six of them the explanation, with log-probs drawn at random."""
    generator = torch.Generator().manual_seed(index)
    student, old, solution = (-torch.rand(size, generator=generator) for size in (6, 7, 3))
    prompt = Prompt(Problem(f"row {index // 4}", "q", "s"), torch.tensor([1, 2]))
    teacher = SpannedSequence(torch.arange(9), (Span(2, 9),))
    read = SpannedSequence(torch.arange(12), (Span(1, 7), Span(8, 11)))
    flags = frozenset({FormatFlag.MISSING_END_TAG}) if index % 3 == 0 else frozenset()
    pair = ScoringPair(prompt.problem, teacher, read, 6, flags, "")
    solution = solution if index != 5 else torch.tensor([-math.inf])
    evidence = RewardEvidence(
        student_explanation_logprobs=student,
        student_solution_logprobs=solution,
        teacher_explanation_logprobs=old[:6],
        baseline_solution_logprobs=solution - 1,
        divergence=None,
        flags=flags,
        leaks=LeakMetrics(0.0, 0.0, index / 16, 0.0),
        one_tokenizer=True,
    )
    reward = rlt_reward(evidence, config.reward)
    return ScoredExplanation(
        prompt=prompt,
        completion=Completion(torch.arange(7), old, 0.7, FinishReason.STOP, index, 0),
        question_index=index // 4 % 2,
        completion_index=index % 4,
        sequence=teacher,
        old_logprobs=old,
        old_entropy=old,
        reference_logprobs=None,
        students={"student": StudentScores(pair, student, solution, solution - 1)},
        rewards={"student": reward},
        combined=reward,
    )
