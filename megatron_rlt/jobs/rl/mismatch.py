"""Compares the sampling engine with the trainer at every RL step, and stops a run in which they part.

In: a step's groups and the trainer's log-probs of them, before the update. Out: the gap for the metrics, the worst
completion on disk. Every rank holds all of it and reaches the same answer; one rank writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from megatron_rlt.types import Completion, Logprobs, RolloutGroup, StoppedError

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, eq=False)
class Mismatch:
    """What engine and trainer disagree about in one step, and what the update does about it."""

    gap: RolloutGap
    correction: Correction
    policy_lag: float  # updates since the weights that sampled, mean over completions


@dataclass(frozen=True)
class MismatchWatch:
    """What a step asks before its update."""

    settings: MismatchConfig
    folder: Path
    decode: Decode
    store: WorstCompletions | None  # of the writing rank

    @classmethod
    def of_run(cls, settings: MismatchConfig, folder: Path, decode: Decode) -> MismatchWatch:
        """The watch of a run folder; `decode` writes completions' ids as text."""
        return cls(settings, folder, decode, WorstCompletions(folder) if dist.get_rank() == 0 else None)

    def compare(
        self, groups: Sequence[RolloutGroup], old_policy: Logprobs, number: int, policy_version: int
    ) -> Mismatch:
        """Measure a step's gap and record its worst completion. `number` counts from 0.

        Args:
            policy_version: of the weights that gave `old_policy`.

        Raises:
            StoppedError: a token's gap exceeds `max_rollout_gap`, or is not a number while there is a bound; not where
                older weights have sampled, as the gap is then also what training changed.
        """
        completions = [completion for group in groups for completion in group.completions]
        rollout = [completion.rollout_logprobs for completion in completions]
        gap = rollout_gap(rollout, old_policy.values)
        worst = _describe_worst(gap, groups, old_policy, self.decode)
        if self.store is not None:
            self.store.log(number + 1, worst)
        bound = self.settings.max_rollout_gap
        lags = [policy_version - completion.policy_version for completion in completions]
        if bound is not None and not any(lags) and not gap.maximum <= bound:
            dist.barrier()  # the first rank that ends has the others ended: the line is on disk before
            raise StoppedError(_complaint(worst, old_policy, bound, step=number + 1, file=self.folder / WORST_FILE))
        correction = correction_of(self.settings, rollout, old_policy.values)
        return Mismatch(gap, correction, policy_lag=sum(lags) / len(lags))


def logprob_metrics(old_policy: Logprobs, mismatch: Mismatch) -> dict[str, float]:
    """Entropy of the policy, and how far the sampling engine's log-probs are from the trainer's."""
    return {
        "entropy": float(torch.cat(old_policy.entropy).mean()),
        "rollout_gap_mean": mismatch.gap.mean,
        "rollout_gap_p99": mismatch.gap.p99,
        "rollout_gap_max": mismatch.gap.maximum,
        "rollout_sequence_kl": mismatch.gap.sequence_kl,
        "policy_lag": mismatch.policy_lag,
    } | mismatch.correction.metrics()


def _describe_worst(
    gap: RolloutGap, groups: Sequence[RolloutGroup], old_policy: Logprobs, decode: Decode
) -> WorstCompletion:
    places = [(question, member) for question, group in enumerate(groups) for member in range(len(group.completions))]
    question, member = places[gap.worst_completion]
    completion: Completion = groups[question].completions[member]
    ids: list[int] = completion.token_ids.tolist()
    return WorstCompletion(
        problem_id=groups[question].prompt.problem.problem_id,
        question_index=question,
        completion_index=member,
        seed=completion.seed,
        policy_version=completion.policy_version,
        temperature=completion.temperature,
        gap=gap.maximum,
        token_index=gap.worst_token,
        num_tokens=len(ids),
        token_id=ids[gap.worst_token],
        token_text=decode([ids[gap.worst_token]]),
        rollout_logprob=float(completion.rollout_logprobs[gap.worst_token]),
        old_logprob=float(old_policy.values[gap.worst_completion][gap.worst_token]),
        text=decode(ids),
    )


def _complaint(worst: WorstCompletion, old_policy: Logprobs, bound: float, *, step: int, file: Path) -> str:
    """One line: what was found, where, and what usually is the reason."""
    return (
        f"step {step}: the sampling engine and the trainer differ by {worst.gap:.3g} in the log-prob of one token, more"
        f" than mismatch.max_rollout_gap={bound:g}; no update was made. It is token {worst.token_index + 1} of"
        f" {worst.num_tokens} ({worst.token_text!r}: engine {worst.rollout_logprob:.4g}, trainer"
        f" {worst.old_logprob:.4g}) of completion {worst.completion_index} of problem {worst.problem_id}; its text is"
        f" the last line of {file}. Probable causes: temperature mode (engine {worst.temperature:g}, trainer"
        f" {old_policy.temperature:g}; or rollout.top_p below 1); dtype (bfloat16 differs by some 0.1, float32 by some"
        f" 1e-5); stale weights in the engine (it sampled with version {worst.policy_version}); a prefix cache that"
        " outlived a change of weights. `megatron-rlt parity` tells which side is wrong; with a known reason, raise the"
        " bound"
    )


# Which completions and tokens of a step an update learns from, and how much, given how the engine rated them.
#
# In: the settings and both log-probs. Out: a `Correction`, the same on every rank, and its metrics. The formulas are
# `algorithm/rollout_mismatch.py`'s.
@dataclass(frozen=True, eq=False)
class Correction:
    """Constants of an update, completion by completion; None: that correction is off, and nothing is multiplied."""

    importance: tuple[Tensor, ...] | None  # [C_i] float64, of the policy's part of the loss
    token_kept: tuple[Tensor, ...] | None  # [C_i] bool
    completion_kept: Tensor | None  # [N] bool
    capped: float | None  # share of tokens whose importance the cap cut

    def metrics(self) -> dict[str, float]:
        """Of the corrections that are on, over all tokens and completions of the step."""
        metrics = {}
        if self.importance is not None and self.capped is not None:
            metrics["rollout_weight_mean"] = float(torch.cat(self.importance).mean())
            metrics["rollout_weight_capped_share"] = self.capped
        if self.token_kept is not None:
            metrics["rollout_masked_tokens"] = float((~torch.cat(self.token_kept)).sum())
        if self.completion_kept is not None:
            metrics["rollout_masked_completions"] = float((~self.completion_kept).sum())
        return metrics


def correction_of(settings: MismatchConfig, rollout: Sequence[Tensor], old: Sequence[Tensor]) -> Correction:
    """What the settings make of a step.

    Args:
        rollout, old: `[C_i]` each, log-probs by the sampling engine and by the trainer before the update.
    """
    log_ratios = [theirs.double() - sampled.double() for sampled, theirs in zip(rollout, old, strict=True)]
    cap = settings.token_weight_cap or settings.sequence_weight_cap
    weigh = sequence_importance if settings.token_weight_cap is None else token_importance
    importance = None if cap is None else weigh(log_ratios, cap=cap)
    return Correction(
        importance=importance,
        token_kept=tokens_within(log_ratios, low=settings.token_ratio_min, high=settings.token_ratio_max)
        if settings.masks_tokens
        else None,
        completion_kept=sequences_within(log_ratios, low=settings.sequence_ratio_min, high=settings.sequence_ratio_max)
        if settings.masks_sequences
        else None,
        capped=None if importance is None or cap is None else float(torch.cat(importance).ge(cap).double().mean()),
    )
