"""Compares the sampling engine with the trainer at every RL step, and stops a run in which they disagree too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.algorithm.rollout_mismatch import (
    RolloutGap,
    rollout_gap,
    sequence_importance,
    sequences_within,
    token_importance,
    tokens_within,
)
from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.store.worst_completions import WORST_FILE, WorstCompletion, WorstCompletions
from megatron_rlt.types import Correction, ScoredCompletion, StoppedError

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class MismatchWatch:
    """Measures and corrects the mismatch of every step before its update, alike on all ranks; one rank writes."""

    settings: MismatchConfig
    folder: Path
    decode: Decode
    temperature: float  # of the trainer's log-probs
    store: WorstCompletions | None  # of the writing rank

    @classmethod
    def of_run(cls, settings: MismatchConfig, folder: Path, decode: Decode, *, temperature: float) -> MismatchWatch:
        """The watch of a run folder; `decode` writes completions' ids as text."""
        return cls(settings, folder, decode, temperature, WorstCompletions(folder) if dist.get_rank() == 0 else None)

    def check(self, completions: Sequence[ScoredCompletion], number: int, policy_version: int) -> RolloutGap:
        """Measure the gap of step `number`, from 0, and record its worst completion.

        Raises:
            StoppedError: a token's gap exceeds `max_rollout_gap`, or is not a number while there is a bound; not where
                weights older than `policy_version` have sampled, as the gap is then also what training changed.
        """
        gap = rollout_gap(
            [one.completion.rollout_logprobs for one in completions], [one.old_logprobs for one in completions]
        )
        worst = _describe_worst(gap, completions[gap.worst_completion], self.decode)
        if self.store is not None:
            self.store.log(number + 1, worst)
        bound = self.settings.max_rollout_gap
        is_lagging = any(one.completion.policy_version != policy_version for one in completions)
        if bound is not None and not is_lagging and not gap.maximum <= bound:
            dist.barrier()  # the first rank that ends has the others ended: the line is on disk before
            raise StoppedError(self._complaint(worst, bound, step=number + 1))
        return gap

    def corrected(self, completions: Sequence[ScoredCompletion]) -> tuple[ScoredCompletion, ...]:
        """The completions with what the settings make of their log-ratios."""
        settings = self.settings
        ratios = [one.old_logprobs.double() - one.completion.rollout_logprobs.double() for one in completions]
        weights: Sequence[Tensor | None] = [None] * len(ratios)
        if settings.token_weight_cap is not None:
            weights = token_importance(ratios, cap=settings.token_weight_cap)
        elif settings.sequence_weight_cap is not None:
            weights = sequence_importance(ratios, cap=settings.sequence_weight_cap)
        tokens: Sequence[Tensor | None] = [None] * len(ratios)
        if settings.masks_tokens:
            tokens = tokens_within(ratios, low=settings.token_ratio_min, high=settings.token_ratio_max)
        kept = [True] * len(ratios)
        if settings.masks_sequences:
            low, high = settings.sequence_ratio_min, settings.sequence_ratio_max
            kept = sequences_within(ratios, low=low, high=high).tolist()
        return tuple(
            replace(one, correction=Correction(importance, token_kept, is_kept))
            for one, importance, token_kept, is_kept in zip(completions, weights, tokens, kept, strict=True)
        )

    def metrics(self, completions: Sequence[ScoredCompletion]) -> dict[str, float]:
        """What the corrections that are on do, over all tokens and completions of the step."""
        settings, metrics = self.settings, {}
        cap = settings.token_weight_cap or settings.sequence_weight_cap
        weights = [one.correction.importance for one in completions if one.correction.importance is not None]
        if cap is not None:
            joined = torch.cat(weights)
            metrics["rollout_weight_mean"] = float(joined.mean())
            metrics["rollout_weight_capped_share"] = float(joined.ge(cap).double().mean())
        if settings.masks_tokens:
            masks = [one.correction.token_kept for one in completions if one.correction.token_kept is not None]
            metrics["rollout_masked_tokens"] = float((~torch.cat(masks)).sum())
        if settings.masks_sequences:
            metrics["rollout_masked_completions"] = float(sum(not one.correction.kept for one in completions))
        return metrics

    def _complaint(self, worst: WorstCompletion, bound: float, *, step: int) -> str:
        """One line: what was found, where, and what usually is the reason."""
        return (
            f"step {step}: the sampling engine and the trainer differ by {worst.gap:.3g} in the log-prob of one token,"
            f" more than mismatch.max_rollout_gap={bound:g}; no update was made. It is token {worst.token_index + 1} of"
            f" {worst.num_tokens} ({worst.token_text!r}: engine {worst.rollout_logprob:.4g}, trainer"
            f" {worst.old_logprob:.4g}) of completion {worst.completion_index} of problem {worst.problem_id}; its text"
            f" is the last line of {self.folder / WORST_FILE}. Probable causes: temperature mode (engine"
            f" {worst.temperature:g}, trainer {self.temperature:g}; or rollout.top_p below 1); dtype (bfloat16 differs"
            " by some 0.1, float32 by some 1e-5); stale weights in the engine (it sampled with version"
            f" {worst.policy_version}); a prefix cache that outlived a change of weights. `megatron-rlt parity` tells"
            " which side is wrong; with a known reason, raise the bound"
        )


def logprob_metrics(
    completions: Sequence[ScoredCompletion], gap: RolloutGap, *, policy_version: int
) -> dict[str, float]:
    """Entropy of the policy, and how far the sampling engine's log-probs are from the trainer's.

    `policy_version`: of the weights that gave the old log-probs.
    """
    lags = [policy_version - one.completion.policy_version for one in completions]
    return {
        "entropy": float(torch.cat([one.old_entropy for one in completions]).mean()),
        "rollout_gap_mean": gap.mean,
        "rollout_gap_p99": gap.p99,
        "rollout_gap_max": gap.maximum,
        "rollout_sequence_kl": gap.sequence_kl,
        "policy_lag": sum(lags) / len(lags),
    }


def _describe_worst(gap: RolloutGap, worst: ScoredCompletion, decode: Decode) -> WorstCompletion:
    completion = worst.completion
    ids: list[int] = completion.token_ids.tolist()
    return WorstCompletion(
        problem_id=worst.prompt.problem.problem_id,
        question_index=worst.question_index,
        completion_index=worst.completion_index,
        seed=completion.seed,
        policy_version=completion.policy_version,
        temperature=completion.temperature,
        gap=gap.maximum,
        token_index=gap.worst_token,
        num_tokens=len(ids),
        token_id=ids[gap.worst_token],
        token_text=decode([ids[gap.worst_token]]),
        rollout_logprob=float(completion.rollout_logprobs[gap.worst_token]),
        old_logprob=float(worst.old_logprobs[gap.worst_token]),
        text=decode(ids),
    )
