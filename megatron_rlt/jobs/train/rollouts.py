"""Where a step's explanations come from: pi_T(e | q, s), sampled when the step begins, or while the one before trains.

In: problems. Out: groups of completions, part by part as they come, and what a checkpoint needs of those that exist
before their step. Every rank holds all of it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_rlt.config.rollout import RolloutConfig
from megatron_rlt.data.shards import problem_from_json, problem_to_json
from megatron_rlt.jobs.rl.grpo import Draw, group_requests, groups_of, rollout_work, sample_groups
from megatron_rlt.jobs.run.problems import NextProblems
from megatron_rlt.jobs.train.engines import RlRooms
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.rollout.vllm.synced_engines import ServedVllm
from megatron_rlt.types import Completion, FinishReason, Problem, Prompt, RolloutGroup


@dataclass(frozen=True, eq=False)
class Explained:
    """Some questions of a step, as soon as all of their completions are there."""

    part: int  # of the step; parts in their order are the batch in its order
    groups: tuple[RolloutGroup, ...]


@dataclass(frozen=True, eq=False)
class _Rollout:
    """What servers were asked for one step."""

    prompts: tuple[Prompt, ...]
    parts: tuple[range, ...]  # of the prompts
    sampled: tuple[RolloutGroup, ...] | None  # None: the servers have them, or work on them


def explain(rooms: RlRooms, problems: Sequence[Problem], number: int, timer: PhaseTimer) -> tuple[Explained, ...]:
    """`group_size` explanations of every question at once, as one part. `number` of the step, from 0. Collective."""
    with timer.phase("rollout") as phase:
        groups = sample_groups(
            rooms.rollout,
            _prompts(rooms, problems),
            _draw(rooms, number),
            group_size=rooms.grpo.group_size,
            policy_version=rooms.policy.num_updates,
        )
        phase.count(*rollout_work(rooms.rollout, groups))
    return (Explained(0, groups),)


class Explanations:
    """The explanations of one step after the other. All methods are collective."""

    def __init__(self, rooms: RlRooms, rollout: RolloutConfig, next_problems: NextProblems, *, num_steps: int) -> None:
        """
        Args:
            num_steps: of the whole run; nothing is sampled ahead of the last.
        """
        self._rooms, self._next_problems, self._num_steps = rooms, next_problems, num_steps
        self._is_ahead, self._num_parts = rollout.ahead == 1, rollout.vllm.server.scoring_parts
        self._begun: _Rollout | None = None  # for a step that has not begun

    def of_step(self, number: int, timer: PhaseTimer) -> Iterator[Explained]:
        """All parts of a step's batch, as they come. `number` counts from 0; steps are asked for in their order."""
        engine = self._rooms.rollout
        if not isinstance(engine, ServedVllm):
            yield from explain(self._rooms, self._problems(timer), number, timer)
            return
        rollout = self._begin(engine, number, timer) if self._begun is None else self._begun
        self._begun = None
        num_come = 0
        while num_come < len(rollout.parts):
            with timer.phase("rollout") as phase:
                come = self._wait(engine, rollout)
                if not self._is_ahead:  # else waiting is not what sampling took
                    phase.count(*rollout_work(engine, [group for part in come for group in part.groups]))
            num_come += len(come)
            if num_come == len(rollout.parts) and self._is_ahead and number + 1 < self._num_steps:
                self._begun = self._begin(engine, number + 1, timer)
            yield from come

    def state_bytes(self) -> bytes:
        """What exists of the next step, for a checkpoint; waits for what is being sampled. Empty without."""
        engine, rollout = self._rooms.rollout, self._begun
        if rollout is None:
            return b""
        assert isinstance(engine, ServedVllm), "only servers sample ahead"
        parts: dict[int, Explained] = {}
        while len(parts) < len(rollout.parts):
            parts |= {one.part: one for one in self._wait(engine, rollout)}
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
            return self._next_problems(self._rooms.grpo.questions_per_step)

    def _begin(self, engine: ServedVllm, number: int, timer: PhaseTimer) -> _Rollout:
        """Ask servers with the policy's weights of now."""
        rooms, size = self._rooms, self._rooms.grpo.group_size
        prompts = _prompts(rooms, self._problems(timer))
        parts = _cut(len(prompts), self._num_parts)
        with timer.phase("rollout"):
            engine.start(
                group_requests(prompts, _draw(rooms, number), group_size=size),
                rooms.policy.num_updates,
                [range(size * part.start, size * part.stop) for part in parts],
            )
        return _Rollout(prompts, parts, None)

    def _wait(self, engine: ServedVllm, rollout: _Rollout) -> list[Explained]:
        """Parts that have come since the last call, at least one."""
        if rollout.sampled is not None:
            return [Explained(i, rollout.sampled[part.start : part.stop]) for i, part in enumerate(rollout.parts)]
        return [
            Explained(one.part, groups_of(_of_part(rollout, one.part), one.completions))
            for one in engine.arrivals(self._rooms.policy.num_updates)
        ]


def _prompts(rooms: RlRooms, problems: Sequence[Problem]) -> tuple[Prompt, ...]:
    return tuple(rooms.pairs.teacher.prompt(problem) for problem in problems)


def _draw(rooms: RlRooms, number: int) -> Draw:
    return Draw(rooms.seed, number, first_question=0)


def _of_part(rollout: _Rollout, number: int) -> tuple[Prompt, ...]:
    part = rollout.parts[number]
    return rollout.prompts[part.start : part.stop]


def _cut(num_questions: int, num_parts: int) -> tuple[range, ...]:
    """Contiguous parts of nearly one size, none empty."""
    num_parts = min(num_parts, num_questions)
    edges = [num_questions * part // num_parts for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(edges))


# Groups of completions as bytes, for the checkpoint of a run that samples ahead of its steps.
#
# Tokens and log-probs come back to the bit: a resumed run trains on what was sampled, whose weights no longer exist.
def groups_to_bytes(groups: Sequence[RolloutGroup]) -> bytes:
    """All that a group holds."""
    buffer = io.BytesIO()
    torch.save([_group_record(group) for group in groups], buffer)
    return buffer.getvalue()


def groups_from_bytes(data: bytes) -> tuple[RolloutGroup, ...]:
    """The inverse of `groups_to_bytes`."""
    return tuple(_group(record) for record in torch.load(io.BytesIO(data), weights_only=True))


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
