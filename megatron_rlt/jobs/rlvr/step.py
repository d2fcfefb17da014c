"""One step of a student's own RL (RLVR): sample answers, check them, compare within groups, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rlt.algorithm.advantages import groups_with_signal
from megatron_rlt.algorithm.token_weights import soft_overlong_punishment
from megatron_rlt.config.commands.rlvr import VerifierConfig
from megatron_rlt.jobs.reward.judging import AnswerJudge, judge_on_ranks
from megatron_rlt.jobs.rl.grpo import SeedSource, rollout_work, sample_groups
from megatron_rlt.jobs.rl.learner import LearnedStep, Learner
from megatron_rlt.jobs.run.problems import NextProblems
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.rewards.answers import AnswerTags, is_well_formed
from megatron_rlt.rewards.verifiable import Verdict, verifiable_reward
from megatron_rlt.rollout.requests import SamplingEngine
from megatron_rlt.types import OnProgress, Problem, Prompt, RolloutGroup, ScoredCompletion


@dataclass(frozen=True)
class RlvrContext:
    """Models, engines and settings used by one RLVR step."""

    seed: int
    verifier: VerifierConfig
    student: StudentFormat
    tags: AnswerTags
    judge: AnswerJudge
    rollout: SamplingEngine
    learner: Learner
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
    def has_signal(self) -> bool:
        """Whether some answers are right and some are not."""
        correct = torch.tensor([float(verdict.correct) for verdict in self.verdicts])
        valid = torch.ones(len(self.verdicts), dtype=torch.bool)
        return bool(groups_with_signal(correct, valid, group_size=len(self.verdicts), tolerance=0.0))


@dataclass(frozen=True, eq=False)
class RlvrStep:
    """One step's groups with their verdicts, and what the policy learned from them."""

    judged: tuple[JudgedGroup, ...]
    num_replaced: int  # groups without signal that were dropped
    learned: LearnedStep[ScoredCompletion]


def rlvr_step(context: RlvrContext, next_problems: NextProblems, number: int, timer: PhaseTimer) -> RlvrStep:
    """Answer, check, compare, update. `number` counts from 0."""
    judged, num_replaced = sample_judged_groups(context, next_problems, number, timer)
    completions, gap = context.learner.score([one.group for one in judged], number, timer)
    rewards = [reward for one in judged for reward in one.rewards]
    rewarded = [replace(one, reward=reward) for one, reward in zip(completions, rewards, strict=True)]
    learned = context.learner.learn(rewarded, gap, number, timer, smallest_spread=0.0)  # a verdict has no noise
    return RlvrStep(judged, num_replaced, learned)


def sample_judged_groups(
    context: RlvrContext, next_problems: NextProblems, number: int, timer: PhaseTimer
) -> tuple[tuple[JudgedGroup, ...], int]:
    """`questions_per_step` judged groups, and how many without signal were replaced (DAPO's dynamic sampling).

    After the last round groups without signal fill what is missing: their advantages are 0, so they teach nothing, but
    the batch keeps its size.
    """
    wanted = context.learner.grpo.questions_per_step
    kept: list[JudgedGroup] = []
    flat: list[JudgedGroup] = []
    for _ in range(context.verifier.max_sampling_rounds):
        with timer.phase("data"):
            problems = next_problems(wanted - len(kept))
        sampled = _judged_groups(
            context, problems, SeedSource(context.seed, number, first_question=len(kept) + len(flat)), timer
        )
        kept += [one for one in sampled if one.has_signal]
        flat += [one for one in sampled if not one.has_signal]
        if len(kept) == wanted:
            break
    missing = wanted - len(kept)
    return (*kept, *flat[len(flat) - missing :]), len(flat) - missing


def _judged_groups(
    context: RlvrContext, problems: Sequence[Problem], seeds: SeedSource, timer: PhaseTimer
) -> list[JudgedGroup]:
    prefill = context.verifier.prefill_thought
    prompts = [
        Prompt(p, context.student.solving_prompt(p.problem_id, p.question, prefill_thought=prefill)) for p in problems
    ]
    with timer.phase("rollout") as phase:
        groups = sample_groups(
            context.rollout,
            prompts,
            seeds,
            group_size=context.learner.grpo.group_size,
            policy_version=context.learner.policy.num_updates,
        )
        phase.count(*rollout_work(context.rollout, groups))
    with timer.phase("reward"):
        texts = [context.student.completion_text(c.token_ids.tolist()) for g in groups for c in g.completions]
        asked = [group.prompt.problem for group in groups for _ in group.completions]
        verdicts = judge_on_ranks(context.judge, asked, texts, context.on_progress)
    size = context.learner.grpo.group_size
    return [
        _judge_group(context, group, texts[size * at : size * (at + 1)], verdicts[size * at : size * (at + 1)])
        for at, group in enumerate(groups)
    ]


def _judge_group(
    context: RlvrContext, group: RolloutGroup, texts: Sequence[str], verdicts: Sequence[Verdict]
) -> JudgedGroup:
    well_formed = tuple(
        is_well_formed(text, context.tags, thought_is_open=context.verifier.prefill_thought) for text in texts
    )
    punishments = _overlong_punishments(context, group)
    rewards = tuple(
        punishment
        + verifiable_reward(
            verdict,
            well_formed=form,
            correct=context.verifier.correct,
            wrong=context.verifier.wrong,
            well_formed_bonus=context.verifier.well_formed_bonus,
            malformed=context.verifier.malformed,
        )
        for verdict, form, punishment in zip(verdicts, well_formed, punishments, strict=True)
    )
    return JudgedGroup(group, tuple(texts), tuple(verdicts), well_formed, rewards)


def _overlong_punishments(context: RlvrContext, group: RolloutGroup) -> list[float]:
    """What a completion that nears its budget's end costs, 0 or less."""
    lengths = [len(completion.token_ids) for completion in group.completions]
    overlong = context.verifier.overlong
    if overlong is None:
        return [0.0] * len(lengths)
    punishments = soft_overlong_punishment(
        lengths, max_completion_tokens=context.learner.max_completion_tokens, buffer_tokens=overlong.buffer_tokens
    )
    return [float(value) for value in overlong.weight * punishments]
