"""From explanations to rewards with one student: its log-probs, the KL to the teacher, the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_rlt.config.models import ScoringConfig
from megatron_rlt.config.reward import LeakConfig, RewardConfig
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.answers import last_boxed
from megatron_rlt.rewards.control import empty_explanation
from megatron_rlt.rewards.leaks import leak_metrics
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import LeakMetrics, Reward, RewardEvidence, ScoringPair, SpannedSequence, StudentScores

FIRST = "student"
"""Name of the student that every run has."""


@dataclass(frozen=True)
class Scorer:
    """One frozen student with its own format, and everything its log-probs become a reward with."""

    pairs: PairBuilder
    engine: LogprobEngine
    divergence: DivergenceEngine | None  # only for the exact KL
    reward: RewardConfig
    with_baseline: bool  # ask for each solution without an explanation, too

    def read(self, pairs: Sequence[ScoringPair], timer: PhaseTimer, *, phase_name: str) -> tuple[StudentScores, ...]:
        """Student log-probs of each pair's explanation and solution. Collective: every rank passes the same pairs."""
        with timer.phase(phase_name) as phase:
            unexplained = _no_explanation_sequences(self.pairs, pairs) if self.with_baseline else {}
            sequences = [pair.student for pair in pairs]
            values = self.engine.logprobs(sequences).values
            baselines = (
                dict(zip(unexplained, self.engine.logprobs(list(unexplained.values())).values, strict=True))
                if unexplained
                else {}
            )
            sequences += unexplained.values()
            phase.count(sum(len(sequence) for sequence in sequences), self.engine.model_flops(sequences))
        return tuple(
            StudentScores(pair, explanation, solution, baselines.get((pair.problem.question, pair.problem.solution)))
            for pair, (explanation, solution) in zip(pairs, map(_split, pairs, values), strict=True)
        )

    def rewards(self, scores: Sequence[StudentScores], teacher: Sequence[Tensor]) -> tuple[Reward, ...]:
        """The reward of each explanation. Collective with an exact KL.

        `teacher`: `[C]` each, the teacher's log-probs of the whole completions at the engines' temperature.
        """
        pairs = [one.pair for one in scores]
        exact = [None] * len(pairs) if self.divergence is None else self.divergence.per_token(pairs)
        return tuple(
            rlt_reward(
                RewardEvidence(
                    student_explanation_logprobs=one.explanation_logprobs,
                    student_solution_logprobs=one.solution_logprobs,
                    teacher_explanation_logprobs=completion[: one.pair.num_explanation_tokens],
                    baseline_solution_logprobs=one.baseline_logprobs,
                    divergence=divergence,
                    flags=one.pair.flags,
                    leaks=count_leaks(one.pair, self.reward.leaks),
                    one_tokenizer=one.pair.one_tokenizer,
                ),
                self.reward,
            )
            for one, completion, divergence in zip(scores, teacher, exact, strict=True)
        )

    def divergence_flops(self, pairs: Sequence[ScoringPair]) -> float:
        """Model FLOP of the exact KL; 0 without."""
        return 0.0 if self.divergence is None else self.divergence.model_flops(pairs)


def score_pairs(
    teacher: LogprobEngine, student: Scorer, pairs: Sequence[ScoringPair], timer: PhaseTimer
) -> tuple[Reward, ...]:
    """Rewards of explanations without a training step, from both models' log-probs. Collective, as `Scorer.read`."""
    with timer.phase("teacher") as phase:
        written = [pair.teacher for pair in pairs]
        logprobs = teacher.logprobs(written).values
        phase.count(sum(len(sequence) for sequence in written), teacher.model_flops(written))
    scores = student.read(pairs, timer, phase_name=FIRST)
    with timer.phase("reward") as phase:
        phase.model_flops = student.divergence_flops(pairs)
        return student.rewards(scores, logprobs)


def build_scorer(
    teacher: LogprobEngine,
    student: LogprobEngine,
    pairs: PairBuilder,
    *,
    reward: RewardConfig,
    scoring: ScoringConfig,
    with_baseline: bool = False,
) -> Scorer:
    """Bind a student's engine to its format and the reward. Collective; `with_baseline`: in every reward unit."""
    divergence = DivergenceEngine(teacher, student, scoring) if reward.kl_estimator == "full" else None
    return Scorer(pairs, student, divergence, reward, with_baseline or reward.solution_unit == "gain")


def count_leaks(pair: ScoringPair, config: LeakConfig) -> LeakMetrics:
    """Leak metrics of one explanation; the answer it may state is the last box of the solution."""
    return leak_metrics(
        pair.explanation_text,
        pair.problem.solution,
        answer=last_boxed(pair.problem.solution),
        ngram=config.ngram,
        closing_share=config.closing_share,
    )


def _split(pair: ScoringPair, values: Tensor) -> tuple[Tensor, Tensor]:
    explanation, solution = pair.student.split(values)
    return explanation, solution


def _no_explanation_sequences(
    formats: PairBuilder, pairs: Sequence[ScoringPair]
) -> dict[tuple[str, str], SpannedSequence]:
    """What a student reads without an explanation, by question and solution; each stands there once."""
    distinct = {(pair.problem.question, pair.problem.solution): pair for pair in pairs}
    return {
        key: formats.student.splice(pair.problem, empty_explanation(pair.explanation_ids))
        for key, pair in distinct.items()
    }


def shown_terms(pairs: PairBuilder) -> tuple[str, ...]:
    """What a person watches of the rewards: r_KL only where there is one."""
    return ("reward", "r_ss", "r_kl") if pairs.one_tokenizer else ("reward", "r_ss")
