"""One step of a student's own RL: sample answers, check them, compare within groups, update.

The loop is the teacher's (`rl_step.py`); what differs is where the reward comes from. Every rank holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import groups_with_spread
from megatron_rlt.algorithm.token_weights import soft_overlong_punishment
from megatron_rlt.config.commands.rlvr import VerifierConfig
from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.reward.judging import AnswerJudge, judge_on_ranks
from megatron_rlt.jobs.rl.grpo import (
    Draw,
    UpdateBatch,
    compare_within_groups,
    follow_policy,
    rollout_work,
    sample_groups,
    update_policy,
)
from megatron_rlt.jobs.rl.mismatch import Mismatch, MismatchWatch
from megatron_rlt.jobs.run.problems import NextProblems
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy, Update
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.rewards.answers import AnswerTags, is_well_formed
from megatron_rlt.rewards.verifiable import Verdict, verifiable_reward
from megatron_rlt.rollout.requests import SamplingEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import (
    Completion,
    FinishReason,
    Logprobs,
    OnProgress,
    Problem,
    Prompt,
    RolloutGroup,
    Span,
    SpannedSequence,
)


@dataclass(frozen=True)
class SolverRooms:
    """Everything that `solver_step` calls."""

    seed: int
    grpo: GrpoConfig
    verifier: VerifierConfig
    max_completion_tokens: int
    student: StudentFormat
    tags: AnswerTags
    judge: AnswerJudge
    rollout: SamplingEngine
    policy: Policy
    old_policy: LogprobEngine
    mismatch: MismatchWatch
    reference: LogprobEngine | None
    reference_model: LanguageModel | None
    on_progress: OnProgress


@dataclass(frozen=True, eq=False)
class JudgedGroup:
    """One question's completions with their verdicts and rewards."""

    group: RolloutGroup
    texts: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    well_formed: tuple[bool, ...]
    rewards: tuple[float, ...]

    @property
    def has_spread(self) -> bool:
        """Whether some answers are right and some are not."""
        correct = torch.tensor([float(verdict.correct) for verdict in self.verdicts])
        valid = torch.ones(len(self.verdicts), dtype=torch.bool)
        return bool(groups_with_spread(correct, valid, group_size=len(self.verdicts), tolerance=0.0))


@dataclass(frozen=True, eq=False)
class SolverResult:
    """One step's batch with all that became of it, the same on every rank."""

    judged: tuple[JudgedGroup, ...]
    num_replaced: int  # groups without spread that were dropped
    old_policy: Logprobs
    mismatch: Mismatch  # of the sampling engine's log-probs with these
    advantages: Tensor  # [N] float64
    updates: tuple[Update[Tensor], ...]

    @property
    def completions(self) -> tuple[Completion, ...]:
        return tuple(completion for one in self.judged for completion in one.group.completions)


def solver_step(rooms: SolverRooms, next_problems: NextProblems, number: int, timer: PhaseTimer) -> SolverResult:
    """Answer, check, compare, update. `number` counts from 0."""
    judged, num_replaced = draw_groups(rooms, next_problems, number, timer)
    sequences = tuple(_sequence(one.group.prompt, c) for one in judged for c in one.group.completions)
    num_tokens = sum(len(sequence) for sequence in sequences)
    with timer.phase("old_policy") as phase:
        old_policy = rooms.old_policy.logprobs(sequences)
        phase.count(num_tokens, rooms.old_policy.model_flops(sequences))
    mismatch = rooms.mismatch.compare([one.group for one in judged], old_policy, number, rooms.policy.num_updates)
    with timer.phase("reference") as phase:
        reference = None
        if rooms.reference is not None:
            reference = rooms.reference.logprobs(sequences)
            phase.count(num_tokens, rooms.reference.model_flops(sequences))
    rewards = torch.tensor([reward for one in judged for reward in one.rewards], dtype=torch.float64)
    valid = torch.ones(len(sequences), dtype=torch.bool)
    advantages = compare_within_groups(rewards, valid, rooms.grpo)
    with timer.phase("update") as phase:
        batch = UpdateBatch(
            sequences=sequences,
            advantages=advantages,
            valid=tuple(valid.tolist()),
            truncated=tuple(c.finish_reason is FinishReason.LENGTH for one in judged for c in one.group.completions),
            old_policy=old_policy,
            correction=mismatch.correction,
            reference=reference,
        )
        updates = update_policy(rooms.policy, batch, rooms.grpo, max_completion_tokens=rooms.max_completion_tokens)
        follow_policy(rooms.reference_model, rooms.policy, rooms.grpo, number)
        phase.count(num_tokens, rooms.policy.model_flops(sequences))
    return SolverResult(judged, num_replaced, old_policy, mismatch, advantages, updates)


def draw_groups(
    rooms: SolverRooms, next_problems: NextProblems, number: int, timer: PhaseTimer
) -> tuple[tuple[JudgedGroup, ...], int]:
    """`questions_per_step` judged groups, and how many without spread were replaced (DAPO's dynamic sampling).

    After the last round groups without spread fill what is missing: their advantages are 0, so they teach nothing, but
    the batch keeps its size.
    """
    wanted = rooms.grpo.questions_per_step
    kept: list[JudgedGroup] = []
    flat: list[JudgedGroup] = []
    for _ in range(rooms.verifier.max_sampling_rounds):
        with timer.phase("data"):
            problems = next_problems(wanted - len(kept))
        drawn = _judged_groups(rooms, problems, Draw(rooms.seed, number, first_question=len(kept) + len(flat)), timer)
        kept += [one for one in drawn if one.has_spread]
        flat += [one for one in drawn if not one.has_spread]
        if len(kept) == wanted:
            break
    missing = wanted - len(kept)
    return (*kept, *flat[len(flat) - missing :]), len(flat) - missing


def _judged_groups(rooms: SolverRooms, problems: Sequence[Problem], draw: Draw, timer: PhaseTimer) -> list[JudgedGroup]:
    prefill = rooms.verifier.prefill_thought
    prompts = [
        Prompt(p, rooms.student.solving_prompt(p.problem_id, p.question, prefill_thought=prefill)) for p in problems
    ]
    with timer.phase("rollout") as phase:
        groups = sample_groups(
            rooms.rollout,
            prompts,
            draw,
            group_size=rooms.grpo.group_size,
            policy_version=rooms.policy.num_updates,
        )
        phase.count(*rollout_work(rooms.rollout, groups))
    with timer.phase("reward"):
        texts = [rooms.student.completion_text(c.token_ids.tolist()) for g in groups for c in g.completions]
        asked = [group.prompt.problem for group in groups for _ in group.completions]
        verdicts = judge_on_ranks(rooms.judge, asked, texts, rooms.on_progress)
    size = rooms.grpo.group_size
    return [
        _judge_group(rooms, group, texts[size * at : size * (at + 1)], verdicts[size * at : size * (at + 1)])
        for at, group in enumerate(groups)
    ]


def _judge_group(
    rooms: SolverRooms, group: RolloutGroup, texts: Sequence[str], verdicts: Sequence[Verdict]
) -> JudgedGroup:
    well_formed = tuple(
        is_well_formed(text, rooms.tags, thought_is_open=rooms.verifier.prefill_thought) for text in texts
    )
    punishments = _overlong_punishments(rooms, group)
    rewards = tuple(
        punishment
        + verifiable_reward(
            verdict,
            well_formed=form,
            correct=rooms.verifier.correct,
            wrong=rooms.verifier.wrong,
            well_formed_bonus=rooms.verifier.well_formed_bonus,
            malformed=rooms.verifier.malformed,
        )
        for verdict, form, punishment in zip(verdicts, well_formed, punishments, strict=True)
    )
    return JudgedGroup(group, tuple(texts), tuple(verdicts), well_formed, rewards)


def _overlong_punishments(rooms: SolverRooms, group: RolloutGroup) -> list[float]:
    """What a completion that nears its budget's end costs, 0 or less."""
    lengths = [len(completion.token_ids) for completion in group.completions]
    buffer_tokens = rooms.verifier.overlong_buffer_tokens
    if buffer_tokens is None:
        return [0.0] * len(lengths)
    punishments = soft_overlong_punishment(
        lengths, max_completion_tokens=rooms.max_completion_tokens, buffer_tokens=buffer_tokens
    )
    return [float(value) for value in rooms.verifier.overlong_weight * punishments]


def _sequence(prompt: Prompt, completion: Completion) -> SpannedSequence:
    ids = torch.cat([prompt.token_ids, completion.token_ids])
    return SpannedSequence(ids, (Span(len(prompt.token_ids), len(ids)),))
