"""`megatron-rlt train`: the RL loop. What a step does stands in `step.py`."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.jobs.reward.scorer import FIRST, shown_terms
from megatron_rlt.jobs.run.problems import open_problems
from megatron_rlt.jobs.run.training_loop import TrainingRun
from megatron_rlt.jobs.run.training_state import TrainingState
from megatron_rlt.jobs.train.engines import build_context, student_pairs
from megatron_rlt.jobs.train.metrics import step_metrics
from megatron_rlt.jobs.train.rollouts import RolloutSource
from megatron_rlt.jobs.train.step import step
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanations import CompletionStore
from megatron_rlt.types import Problem

_SHOWN = ("well_formed_share", "completion_tokens")  # beside the rewards


def run_train(config: TrainConfig, heartbeat: Heartbeat) -> int:
    """Train a teacher, or continue where its run folder stops. Collective; returns the exit status.

    Raises ValueError before any weight is loaded if models, tokenizers, data and run folder do not go together.
    """
    run = TrainingRun(config, "train", heartbeat, trained="teacher")
    with run.timer.phase("setup"):
        pairs = student_pairs(config)

        def check(problem: Problem) -> None:
            for formats in pairs.values():
                formats.check_problem(problem)

        stream = open_problems(config.data, seed=config.seed, work_dir=config.output_dir / "data", check=check)
        context = build_context(config, pairs, run.on_progress)
    run.watch_memory(context.memory_usage)
    store = CompletionStore(
        config.output_dir / "completions",
        terms=tuple(LABELS),
        reward=config.reward.of_one_explanation,
        is_writer=config.metrics.store_completions and dist.get_rank() == 0,
    )
    rollouts = RolloutSource(context, config.rollout, stream.next_batch, num_steps=config.num_steps)

    def take_step(number: int) -> dict[str, float]:
        result = step(context, rollouts.next(number, run.timer), number, run.timer)
        with run.timer.phase("record"):
            store.write_step(number + 1, result.completions)
            metrics = step_metrics(result, context, config.reward)
            return metrics | context.rollout.take_metrics()

    state = TrainingState(
        context.learner.policy, context.learner.reference_model, stream, rollouts, context.noise_floor
    )
    return run.train(state, take_step, num_steps=config.num_steps, shown=(*shown_terms(pairs[FIRST]), *_SHOWN))
