"""One GRPO step once completions are sampled: old and reference log-probs, mismatch, advantages, update.

The command computes the reward between `score` and `learn`. Every rank holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from megatron_rlt.algorithm.rollout_mismatch import RolloutGap
from megatron_rlt.config.training import GrpoConfig
from megatron_rlt.jobs.rl.grpo import C, compute_advantages, update_metrics, update_policy
from megatron_rlt.jobs.rl.mismatch import MismatchWatch, logprob_metrics
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy, Update
from megatron_rlt.policy.reference import update_reference_ema
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import RolloutGroup, ScoredCompletion, Span, SpannedSequence


@dataclass(frozen=True, eq=False)
class LearnedStep(Generic[C]):
    """One step's completions with everything that became of them, the same on every rank."""

    completions: tuple[C, ...]  # group by group
    gap: RolloutGap
    policy_version: int  # before the update
    updates: tuple[Update[Tensor], ...]


@dataclass(frozen=True)
class Learner:
    """The policy with everything a step asks of it."""

    policy: Policy
    old_policy: LogprobEngine  # the policy's weights before the update
    reference: LogprobEngine | None  # only with beta > 0
    mismatch: MismatchWatch
    grpo: GrpoConfig
    max_completion_tokens: int

    @property
    def reference_model(self) -> LanguageModel | None:
        return None if self.reference is None else self.reference.model

    def score(
        self, groups: Sequence[RolloutGroup], number: int, timer: PhaseTimer
    ) -> tuple[tuple[ScoredCompletion, ...], RolloutGap]:
        """Old and reference log-probs of every completion, group by group, and the gap to the sampling engine's.

        Collective; `number` of the step, from 0. Raises StoppedError as `MismatchWatch.check`.
        """
        places = [(i, j) for i, group in enumerate(groups) for j in range(len(group.completions))]
        sequences = [_sequence(groups[i], j) for i, j in places]
        num_tokens = sum(len(sequence) for sequence in sequences)
        with timer.phase("old_policy") as phase:
            old = self.old_policy.logprobs(sequences)
            phase.count(num_tokens, self.old_policy.model_flops(sequences))
        references: Sequence[Tensor | None] = [None] * len(sequences)
        with timer.phase("reference") as phase:
            if self.reference is not None:
                references = self.reference.logprobs(sequences).values
                phase.count(num_tokens, self.reference.model_flops(sequences))
        scored = tuple(
            ScoredCompletion(
                prompt=groups[i].prompt,
                completion=groups[i].completions[j],
                question_index=i,
                completion_index=j,
                sequence=sequences[index],
                old_logprobs=old.values[index],
                old_entropy=old.entropy[index],
                reference_logprobs=references[index],
            )
            for index, (i, j) in enumerate(places)
        )
        gap = self.mismatch.check(scored, number, self.policy.num_updates)
        return self.mismatch.corrected(scored), gap

    def learn(
        self, completions: Sequence[C], gap: RolloutGap, number: int, timer: PhaseTimer, *, smallest_spread: float
    ) -> LearnedStep[C]:
        """Compare completions within their groups and update the policy. Collective; `number` counts from 0.

        `smallest_spread`: as of `compute_advantages`.
        """
        version = self.policy.num_updates
        with timer.phase("update") as phase:
            compared = compute_advantages(completions, self.grpo, smallest_spread=smallest_spread)
            updates = update_policy(self.policy, compared, self.grpo, max_completion_tokens=self.max_completion_tokens)
            self._maybe_update_reference(number)
            sequences = [one.sequence for one in compared]
            phase.count(sum(len(sequence) for sequence in sequences), self.policy.model_flops(sequences))
        return LearnedStep(compared, gap, version, updates)

    def metrics(self, step: LearnedStep[C]) -> dict[str, float]:
        """What every RL job logs of a step: log-probs, mismatch, advantages, updates."""
        return {
            "advantage_std": float(
                torch.tensor([one.advantage for one in step.completions], dtype=torch.float64).std()
            ),
            **logprob_metrics(step.completions, step.gap, policy_version=step.policy_version),
            **self.mismatch.metrics(step.completions),
            **update_metrics(step.updates),
        }

    def _maybe_update_reference(self, number: int) -> None:
        """Every n steps: reference <- mix * policy + (1 - mix) * reference."""
        settings = self.grpo.reference
        if self.reference is None or settings is None or settings.sync_steps is None:
            return
        if (number + 1) % settings.sync_steps == 0:
            update_reference_ema(self.reference.model, self.policy.model, policy_share=settings.mix)


def _sequence(group: RolloutGroup, member: int) -> SpannedSequence:
    """Prompt and completion; wanted are the log-probs of the completion."""
    prompt = group.prompt.token_ids
    ids = torch.cat([prompt, group.completions[member].token_ids])
    return SpannedSequence(ids, (Span(len(prompt), len(ids)),))
