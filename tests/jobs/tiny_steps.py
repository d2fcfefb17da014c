"""Real RL steps of the demo's untrained model in one process, without a run folder around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.rl.learner import LearnedStep
from megatron_rlt.jobs.train.engines import TrainContext, build_context, student_pairs
from megatron_rlt.jobs.train.rollouts import explain
from megatron_rlt.jobs.train.step import step
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.types import Problem, ScoredExplanation, tell_nobody
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs

PROBLEMS = (Problem("one", "5 +5 *5 *6 +4", "3"), Problem("two", "2 *3 *2 +5 *6", "3"))
# One pack for everything that is scored, one micro-batch for an update.
SINGLE_RANK = ("world_size=1", "teacher.layout={tp: 1, sp: false}", "grpo.micro_batch_size=64")


@dataclass(frozen=True)
class TinySteps:
    """Everything for `step`."""

    context: TrainContext
    timer: PhaseTimer
    memory: MemoryLedger

    def take(self, number: int) -> LearnedStep[ScoredExplanation]:
        """The step of a number, from 0, on both problems."""
        return step(self.context, explain(self.context, PROBLEMS, number, self.timer), number, self.timer)


def tiny_steps(
    inputs: TinyInputs, output_dir: Path, *settings: str, on_phase: Callable[[str], None] = tell_nobody
) -> TinySteps:
    """Collective; 2 questions x 4 completions of at most 10 tokens on one rank.

    Args:
        settings: overrides of the demo's RL configuration.
        on_phase: told of every phase that begins.
    """
    overrides = [*SMALL_RL, *inputs.for_train, *SINGLE_RANK, f"output_dir={output_dir}", *settings]
    config = load_config(TrainConfig, RL_CONFIG, overrides)
    memory = MemoryLedger()
    timer = PhaseTimer(heartbeat=on_phase, memory=memory)
    return TinySteps(build_context(config, student_pairs(config), tell_nobody), timer, memory)
