"""This project's side of `tools.bench.against_trl`: one rank of real RL steps."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.jobs.reward.scorer import FIRST
from megatron_rlt.jobs.rl.engines import sampling_engine
from megatron_rlt.jobs.train.engines import TrainContext, build_context, student_pairs
from megatron_rlt.jobs.train.rollouts import explain
from megatron_rlt.jobs.train.step import step
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from megatron_rlt.types import Problem, tell_nobody
from tools.bench.turns import StepClock, Task, report, turns
from tools.bench.workload import NeverStop

# Which of a step's phases the other side calls by one name.
_PHASES = {
    "rollout": ("rollout",),
    "reward": ("old_policy", "student", "reward"),
    "reference": ("reference",),
    "update": ("update",),
}


def main() -> None:
    task = Task.load(Path(sys.argv[1]))
    start_distributed(timeout_seconds=600)
    config = TrainConfig.model_validate(task.settings)
    context = _of_fixed_length(build_context(config, student_pairs(config), tell_nobody), config)
    problems = [Problem(str(number), **question) for number, question in enumerate(task.questions)]
    timer = PhaseTimer(heartbeat=lambda _: None, memory=MemoryLedger())
    for number in turns():
        clock = StepClock()
        result = step(context, explain(context, problems, number, timer), number, timer)
        times = clock.read()
        lengths = {len(one.completion.token_ids) for one in result.completions}
        assert lengths == {config.rollout.max_completion_tokens}, f"completions of {lengths} tokens"
        taken = timer.take()
        phases = {name: sum(taken[f"seconds/{part}"] for part in parts) for name, parts in _PHASES.items()}
        mean_reward = statistics.fmean(one.combined.total for one in result.completions)
        report({**times, "phases": phases, "mean_reward": mean_reward})
    stop_distributed()


def _of_fixed_length(context: TrainContext, config: TrainConfig) -> TrainContext:
    """The same context with a sampling engine that never stops early, as `min_new_tokens` does on the other side."""
    engine = sampling_engine(
        config,
        config.teacher,
        context.learner.policy.model,
        num_token_ids=context.students[FIRST].engine.model.unpadded_vocab_size,
        stop=NeverStop(),
        on_progress=tell_nobody,
    )
    return replace(context, rollout=engine)


if __name__ == "__main__":
    main()
