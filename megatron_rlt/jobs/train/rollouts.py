"""Where a step's explanations come from: pi_T(e | q, s), sampled when it begins, or while the one before trains."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_rlt.config.rollout import RolloutConfig
from megatron_rlt.data.shards import problem_from_json, problem_to_json
from megatron_rlt.jobs.rl.grpo import SeedSource, group_requests, groups_of, rollout_work, sample_groups
from megatron_rlt.jobs.run.problems import NextProblems
from megatron_rlt.jobs.train.engines import TrainContext
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.rollout.vllm.server_engine import ServerEngine
from megatron_rlt.types import Completion, FinishReason, Problem, Prompt, RolloutGroup


@dataclass(frozen=True, eq=False)
class RolloutPart:
    """Some questions of a step, as soon as all of their completions are there."""

    index: int  # in the step: parts in this order are the batch in its order
    groups: tuple[RolloutGroup, ...]


@dataclass(frozen=True, eq=False)
class _Rollout:
    """What servers were asked for one step."""

    prompts: tuple[Prompt, ...]
    parts: tuple[range, ...]  # of the prompts
    sampled: tuple[RolloutGroup, ...] | None  # None: the servers have them, or work on them


def explain(
    context: TrainContext, problems: Sequence[Problem], number: int, timer: PhaseTimer
) -> tuple[RolloutPart, ...]:
    """`group_size` explanations of every question at once, as one part. `number` of the step, from 0. Collective."""
    with timer.phase("rollout") as phase:
        groups = sample_groups(
            context.rollout,
            _prompts(context, problems),
            _draw(context, number),
            group_size=context.learner.grpo.group_size,
            policy_version=context.learner.policy.num_updates,
        )
        phase.count(*rollout_work(context.rollout, groups))
    return (RolloutPart(0, groups),)


class RolloutSource:
    """The explanations of one step after the other. All methods are collective."""

    def __init__(
        self, context: TrainContext, rollout: RolloutConfig, next_problems: NextProblems, *, num_steps: int
    ) -> None:
        """`num_steps`: of the whole run; nothing is sampled ahead of the last."""
        self._context, self._next_problems, self._num_steps = context, next_problems, num_steps
        self._is_ahead, self._num_parts = rollout.ahead == 1, rollout.vllm.server.scoring_parts
        self._begun: _Rollout | None = None  # for a step that has not begun

    def next(self, number: int, timer: PhaseTimer) -> Iterator[RolloutPart]:
        """All parts of a step's batch, as they arrive. `number` counts from 0; steps are asked for in their order."""
        engine = self._context.rollout
        if not isinstance(engine, ServerEngine):
            yield from explain(self._context, self._problems(timer), number, timer)
            return
        rollout = self._begin(engine, number, timer) if self._begun is None else self._begun
        self._begun = None
        num_arrived = 0
        while num_arrived < len(rollout.parts):
            with timer.phase("rollout") as phase:
                arrived = self._wait(engine, rollout)
                if not self._is_ahead:  # else waiting is not what sampling took
                    phase.count(*rollout_work(engine, [group for part in arrived for group in part.groups]))
            num_arrived += len(arrived)
            if num_arrived == len(rollout.parts) and self._is_ahead and number + 1 < self._num_steps:
                self._begun = self._begin(engine, number + 1, timer)
            yield from arrived

    def state_bytes(self) -> bytes:
        """What exists of the next step, for a checkpoint; waits for what is being sampled. Empty without."""
        engine, rollout = self._context.rollout, self._begun
        if rollout is None:
            return b""
        assert isinstance(engine, ServerEngine), "only servers sample ahead"
        parts: dict[int, RolloutPart] = {}
        while len(parts) < len(rollout.parts):
            parts |= {one.index: one for one in self._wait(engine, rollout)}
        groups = tuple(group for number in sorted(parts) for group in parts[number].groups)
        self._begun = replace(rollout, sampled=groups)
        return groups_to_bytes(groups)

    def load_state_bytes(self, data: bytes) -> None:
        """Continue with what `state_bytes` gave: the weights that sampled it are gone."""
        if data:
            groups = groups_from_bytes(data)
            prompts = tuple(group.prompt for group in groups)
            self._begun = _Rollout(prompts, _cut(len(prompts), self._num_parts), groups)

    def _problems(self, timer: PhaseTimer) -> Sequence[Problem]:
        with timer.phase("data"):
            return self._next_problems(self._context.learner.grpo.questions_per_step)

    def _begin(self, engine: ServerEngine, number: int, timer: PhaseTimer) -> _Rollout:
        """Ask servers with the policy's weights of now."""
        context, size = self._context, self._context.learner.grpo.group_size
        prompts = _prompts(context, self._problems(timer))
        parts = _cut(len(prompts), self._num_parts)
        with timer.phase("rollout"):
            engine.start(
                group_requests(prompts, _draw(context, number), group_size=size),
                context.learner.policy.num_updates,
                [range(size * part.start, size * part.stop) for part in parts],
            )
        return _Rollout(prompts, parts, None)

    def _wait(self, engine: ServerEngine, rollout: _Rollout) -> list[RolloutPart]:
        """Parts that have arrived since the last call, at least one."""
        if rollout.sampled is not None:
            return [RolloutPart(i, rollout.sampled[part.start : part.stop]) for i, part in enumerate(rollout.parts)]
        return [
            RolloutPart(one.part, groups_of(_of_part(rollout, one.part), one.completions))
            for one in engine.arrivals(self._context.learner.policy.num_updates)
        ]


def _prompts(context: TrainContext, problems: Sequence[Problem]) -> tuple[Prompt, ...]:
    return tuple(context.teacher.prompt(problem) for problem in problems)


def _draw(context: TrainContext, number: int) -> SeedSource:
    return SeedSource(context.seed, number, first_question=0)


def _of_part(rollout: _Rollout, number: int) -> tuple[Prompt, ...]:
    part = rollout.parts[number]
    return rollout.prompts[part.start : part.stop]


def _cut(num_questions: int, num_parts: int) -> tuple[range, ...]:
    """Contiguous parts of nearly one size, none empty."""
    num_parts = min(num_parts, num_questions)
    edges = [num_questions * part // num_parts for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(edges))


def groups_to_bytes(groups: Sequence[RolloutGroup]) -> bytes:
    """Groups as bytes for a checkpoint, exact to the bit: the weights that sampled them no longer exist on resuming."""
    buffer = io.BytesIO()
    torch.save([_group_record(group) for group in groups], buffer)
    return buffer.getvalue()


def groups_from_bytes(data: bytes) -> tuple[RolloutGroup, ...]:
    """The inverse of `groups_to_bytes`. Raises ValueError for anything else."""
    try:
        return tuple(_group(record) for record in torch.load(io.BytesIO(data), weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the completions that were sampled ahead are damaged in the checkpoint ({reason}): take an earlier one"
        ) from error


def _group_record(group: RolloutGroup) -> dict[str, Any]:
    return {
        "problem": problem_to_json(group.prompt.problem),
        "prompt": group.prompt.token_ids,
        "completions": [vars(one) | {"finish_reason": one.finish_reason.value} for one in group.completions],
    }


def _group(record: dict[str, Any]) -> RolloutGroup:
    completions = (
        Completion(**(one | {"finish_reason": FinishReason(one["finish_reason"])})) for one in record["completions"]
    )
    return RolloutGroup(Prompt(problem_from_json(record["problem"]), record["prompt"]), tuple(completions))
