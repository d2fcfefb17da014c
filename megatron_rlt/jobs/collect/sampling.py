"""One part of `collect`'s sampling: the teacher's explanations of some questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_rlt.jobs.collect.rows import Question
from megatron_rlt.jobs.collect.scoring import Explanation
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.types import Completion, FinishReason, Problem, ScoringPair


@dataclass(frozen=True)
class SamplingContext:
    """Engine and settings of the sampling."""

    seed: int
    num_explanations: int
    pairs: PairBuilder
    rollout: SamplingEngine


def sample_part(context: SamplingContext, questions: Sequence[Question], timer: PhaseTimer) -> list[StoredExplanation]:
    """pi_T(e | q, s), several per question. Collective: every rank passes the same questions and gets all rows."""
    asked = [(question, member) for question in questions for member in range(context.num_explanations)]
    with timer.phase("prompts"):
        prompts = {question.row: context.pairs.teacher.prompt(question.problem) for question in questions}
        # By the row in the data set: which other rows were rejected, or stand in this part, changes no explanation.
        requests = [
            SampleRequest(prompts[question.row].token_ids, completion_seed(context.seed, 0, question.row, member))
            for question, member in asked
        ]
    with timer.phase("rollout") as phase:
        completions = context.rollout.generate(requests, policy_version=0)
        model_flops = context.rollout.model_flops([request.token_ids for request in requests], completions)
        phase.count(sum(len(completion.token_ids) for completion in completions), model_flops)
    with timer.phase("pairs"):
        return [
            _row(question, member, completion, context.pairs.pair(prompts[question.row], completion))
            for (question, member), completion in zip(asked, completions, strict=True)
        ]


def sampled_explanation(pairs: PairBuilder, row: StoredExplanation, other_ids: Tensor | None) -> Explanation:
    """What becomes of a row of `sample_part` when it is scored."""
    assert row.completion_ids is not None, "a sampled row has its ids"
    assert row.rollout_logprobs is not None, "a sampled row has its log-probs"
    assert row.finish_reason is not None, "a sampled row has an end"
    assert row.seed is not None, "a sampled row has a seed"
    completion = Completion(
        row.completion_ids, row.rollout_logprobs, row.temperature, row.finish_reason, row.seed, policy_version=0
    )
    prompt = pairs.teacher.prompt(Problem(row.id, row.question, row.solution))
    return Explanation(row, pairs.pair(prompt, completion), row.seed, other_ids)


def sampling_metrics(rows: Sequence[StoredExplanation]) -> dict[str, float]:
    """Form and length of a part's explanations."""
    lengths = Tally.of(row.completion_tokens for row in rows)
    return {
        "explanations": float(len(rows)),
        "well_formed_share": Tally.of(not row.flags for row in rows).mean,
        "truncated_share": Tally.of(row.finish_reason is FinishReason.LENGTH for row in rows).mean,
        "completion_tokens": lengths.mean,
        "completion_tokens_max": lengths.maximum,
    }


def _row(question: Question, member: int, completion: Completion, pair: ScoringPair) -> StoredExplanation:
    row = StoredExplanation.of_pair(
        pair, question_index=question.row - 1, explanation_index=member, temperature=completion.temperature
    )
    return replace(
        row,
        row=question.row,
        finish_reason=completion.finish_reason,
        seed=completion.seed,
        completion_ids=completion.token_ids,
        rollout_logprobs=completion.rollout_logprobs,
    )
