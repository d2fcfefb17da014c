"""`megatron-rlt train`: the RL loop. What a step does stands in `rl_step.py`."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.jobs.reward.score_pairs import build_pairs, shown_parts
from megatron_rlt.jobs.run.problems import open_problems
from megatron_rlt.jobs.run.training_loop import TrainingRun, TrainingState
from megatron_rlt.jobs.train.engines import build_rooms
from megatron_rlt.jobs.train.metrics import completion_rows, step_metrics
from megatron_rlt.jobs.train.rollouts import Explanations
from megatron_rlt.jobs.train.step import step
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.store.completions import CompletionStore
from megatron_rlt.types import Problem

_SHOWN = ("well_formed_share", "completion_tokens")  # beside the rewards


def run_train(config: TrainConfig, heartbeat: Heartbeat) -> int:
    """Train a teacher, or continue where its run folder stops. Collective; returns the exit status.

    Raises:
        ValueError: models, tokenizers, data or run folder do not go together; before any weight is loaded.
    """
    run = TrainingRun(config, "train", heartbeat, source_model=config.teacher.model)
    with run.timer.phase("setup"):
        make_pairs = partial(build_pairs, config.teacher.model, prompts=config.prompts, reward=config.reward)
        pairs = make_pairs(config.student.model)
        further_pairs = {name: make_pairs(model.model) for name, model in config.students.extra.items()}

        def check(problem: Problem) -> None:
            for formats in (pairs, *further_pairs.values()):
                formats.check_problem(problem)

        stream = open_problems(config.data, seed=config.seed, work_dir=config.output_dir / "data", check=check)
        rooms = build_rooms(config, pairs, further_pairs, run.on_progress)
    run.watch_memory(rooms.take_holdings)
    explanations = Explanations(rooms, config.rollout, stream.next_batch, num_steps=config.num_steps)
    store = CompletionStore(config.output_dir / "completions")
    writes_completions = config.metrics.store_completions and dist.get_rank() == 0

    def take_step(number: int) -> dict[str, float]:
        result = step(rooms, explanations.of_step(number, run.timer), number, run.timer)
        with run.timer.phase("record"):
            if writes_completions:
                store.write(number + 1, completion_rows(result, step=number + 1))
            metrics = step_metrics(result, config.grpo, lambda_kl=config.reward.lambda_kl)
            return metrics | rooms.rollout.take_metrics()

    state = TrainingState(rooms.policy, rooms.reference_model, stream, explanations)
    return run.train(state, take_step, num_steps=config.num_steps, shown=(*shown_parts(pairs), *_SHOWN))
