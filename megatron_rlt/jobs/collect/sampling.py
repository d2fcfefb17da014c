"""One part of `collect`'s sampling: the teacher's explanations of some questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlt.jobs.collect.rows import Question
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.store.collected import SampledExplanation
from megatron_rlt.types import FinishReason


@dataclass(frozen=True)
class SamplingRooms:
    """Everything that sampling a part calls."""

    seed: int
    num_explanations: int
    pairs: PairBuilder
    rollout: SamplingEngine


def sample_part(rooms: SamplingRooms, questions: Sequence[Question], timer: PhaseTimer) -> list[SampledExplanation]:
    """pi_T(e | q, s), several times a question. Collective: every rank passes the same questions and gets all rows."""
    with timer.phase("prompts"):
        prompts = [rooms.pairs.teacher.prompt(question.problem) for question in questions]
        asked = [(index, member) for index in range(len(questions)) for member in range(rooms.num_explanations)]
        # By the row in the data set: which other rows were rejected, or stand in this part, changes no explanation.
        requests = [
            SampleRequest(prompts[index].token_ids, completion_seed(rooms.seed, 0, questions[index].row, member))
            for index, member in asked
        ]
    with timer.phase("rollout") as phase:
        completions = rooms.rollout.generate(requests, policy_version=0)
        model_flops = rooms.rollout.model_flops([request.token_ids for request in requests], completions)
        phase.count(sum(len(completion.token_ids) for completion in completions), model_flops)
    with timer.phase("pairs"):
        pairs = [
            rooms.pairs.pair(prompts[index], completion)
            for (index, _), completion in zip(asked, completions, strict=True)
        ]
    return [
        SampledExplanation(
            problem=questions[index].problem,
            row=questions[index].row,
            explanation_index=member,
            completion=completion,
            flags=tuple(sorted(pair.flags)),
            text=pair.explanation_text,
            num_prompt_tokens=len(prompts[index].token_ids),
            num_explanation_tokens=pair.num_explanation_tokens,
        )
        for (index, member), completion, pair in zip(asked, completions, pairs, strict=True)
    ]


def sampling_metrics(samples: Sequence[SampledExplanation]) -> dict[str, float]:
    """Form and length of a part's explanations."""
    lengths = Tally.of(len(sample.completion.token_ids) for sample in samples)
    return {
        "explanations": float(len(samples)),
        "well_formed_share": Tally.of(not sample.flags for sample in samples).mean,
        "truncated_share": Tally.of(sample.completion.finish_reason is FinishReason.LENGTH for sample in samples).mean,
        "completion_tokens": lengths.mean,
        "completion_tokens_max": lengths.maximum,
    }
