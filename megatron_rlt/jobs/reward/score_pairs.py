"""What `train` and `score` share: engines that ask two models for log-probs, and the rewards that follow from these.

In: models in their layouts, scoring pairs. Out: one `RewardParts` a pair, the same on every rank. The formula is
`rewards/`'s, the log-probs are `scoring/`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rlt.config.sections import LayoutConfig, PromptConfig, RewardConfig, ScoringConfig
from megatron_rlt.jobs.reward.baselines import solution_baselines, student_work
from megatron_rlt.jobs.reward.leaks import count_leaks, leak_weights
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.rewards.leaks import leak_penalty, with_leak_penalty
from megatron_rlt.rewards.rlt import KlEstimator, rlt_reward, solution_score, with_solution_score
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import FormatFlag, LeakMetrics, Logprobs, OnProgress, RewardParts, ScoringPair


@dataclass(frozen=True)
class Scorer:
    """Two frozen models and all that their log-probs become a reward with."""

    teacher: LogprobEngine
    student: LogprobEngine
    student_format: StudentFormat
    divergence: DivergenceEngine | None  # only for the exact KL
    reward: RewardConfig
    penalties: Mapping[FormatFlag, float]

    def rewards(self, pairs: Sequence[ScoringPair], timer: PhaseTimer) -> tuple[RewardParts, ...]:
        """Ask teacher and student, reward. Collective: every rank passes the same pairs and gets all rewards."""
        with timer.phase("teacher") as phase:
            written = [pair.teacher for pair in pairs]
            teacher = self.teacher.logprobs(written)
            phase.count(sum(len(sequence) for sequence in written), self.teacher.model_flops(written))
        with timer.phase("student") as phase:
            student = self.student.logprobs([pair.student for pair in pairs])
            baselines = solution_baselines(self.student, self.student_format, pairs, self.reward.solution_unit)
            phase.count(*student_work(self.student, self.student_format, pairs, self.reward.solution_unit))
        with timer.phase("reward") as phase:
            phase.model_flops = 0.0 if self.divergence is None else self.divergence.model_flops(pairs)
            return reward_explanations(
                pairs,
                teacher,
                student,
                baselines,
                count_leaks(pairs, self.reward.leaks),
                divergence=self.divergence,
                reward=self.reward,
                penalties=self.penalties,
            )


def build_pairs(teacher: Path, student: Path, prompts: PromptConfig, reward: RewardConfig) -> PairBuilder:
    """Both prompt formats of two model folders, before any model loads.

    Raises:
        ValueError: tokenizers or tags cannot work; or the tokenizers differ, and the reward compares token by token.
    """
    pairs = pair_builder(teacher, student, prompts, needs_one_tokenizer=reward.lambda_kl != 0)
    if not pairs.one_tokenizer and reward.kl_estimator == "full":
        raise ValueError(
            "reward.kl_estimator=full: compares two distributions over one vocabulary, and teacher and student have two"
            " tokenizers; leave kl_estimator out, with reward.lambda_kl=0 it is not part of the reward"
        )
    return pairs


def shown_parts(pairs: PairBuilder) -> tuple[str, ...]:
    """What a person watches of the rewards: r_KL only where there is one."""
    return ("reward", "r_ss", "r_kl") if pairs.one_tokenizer else ("reward", "r_ss")


def build_layouts(teacher: LayoutConfig, student: LayoutConfig) -> tuple[Layout, Layout]:
    """The teacher's and the student's groups; equal layouts share them. Collective."""
    teacher_layout = build_layout(teacher)
    return teacher_layout, teacher_layout if teacher == student else build_layout(student)


def logprob_engine(
    model: LanguageModel, layout: Layout, *, temperature: float, scoring: ScoringConfig, on_progress: OnProgress
) -> LogprobEngine:
    """Asks a model for log-probs at one temperature."""
    return LogprobEngine(
        model,
        layout,
        temperature=temperature,
        max_tokens_per_pack=scoring.max_tokens_per_pack,
        row_block=scoring.row_block,
        vocab_block=scoring.vocab_block,
        on_progress=on_progress,
    )


def divergence_engine(
    teacher: LogprobEngine, student: LogprobEngine, *, estimator: KlEstimator, scoring: ScoringConfig
) -> DivergenceEngine | None:
    """What the estimator `full` needs; None for the others. Collective."""
    if estimator != "full":
        return None
    return DivergenceEngine(
        teacher,
        student,
        max_rows_per_rank=scoring.max_tokens_per_pack,
        row_block=scoring.row_block,
        vocab_block=scoring.vocab_block,
    )


def reward_explanations(
    pairs: Sequence[ScoringPair],
    teacher: Logprobs,
    student: Logprobs,
    baselines: Sequence[Tensor | None],
    leaks: Sequence[LeakMetrics],
    *,
    divergence: DivergenceEngine | None,
    reward: RewardConfig,
    penalties: Mapping[FormatFlag, float],
) -> tuple[RewardParts, ...]:
    """r = r_SS - lambda * r_KL, with what malformed explanations and leaks cost.

    Args:
        teacher: of each pair's whole completion.
        student: of each pair's explanation, as the student's tokenizer writes it, then its solution.
        baselines: the student's log-probs of each pair's solution without an explanation; None unless r_SS is a gain.
        leaks: of each pair's explanation.
    """
    assert teacher.temperature == student.temperature, "log-probs of two temperatures cannot be compared"
    divergences: Sequence[Tensor | None] = [None] * len(pairs) if divergence is None else divergence.per_token(pairs)
    weights, rewards = leak_weights(reward.leaks), []
    for index, (pair, exact_kl) in enumerate(zip(pairs, divergences, strict=True)):
        explanation, solution = pair.student.split(student.values[index])
        parts = rlt_reward(
            student_explanation_logprobs=explanation,
            student_solution_logprobs=solution,
            teacher_explanation_logprobs=teacher.values[index][: pair.num_explanation_tokens],
            explanation_divergence=exact_kl,
            flags=pair.flags,
            alpha=reward.alpha,
            lambda_kl=reward.lambda_kl,
            kl_estimator=reward.kl_estimator,
            penalties=penalties,
            one_tokenizer=pair.one_tokenizer,
        )
        if reward.solution_unit != "logprob":
            score = solution_score(
                solution, baseline_logprobs=baselines[index], unit=reward.solution_unit, alpha=reward.alpha
            )
            parts = with_solution_score(parts, score, lambda_kl=reward.lambda_kl)
        rewards.append(with_leak_penalty(parts, leak_penalty(leaks[index], weights), lambda_kl=reward.lambda_kl))
    return tuple(rewards)
