"""The frame around training steps: resume, log, save, end on request, export. `train` and `sft` share it."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.checkpoint.folders import find_resumable
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.training_state import POLICY, SharedState, load_training_state, save_training_state
from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.rlvr import SolverConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.data.loader import ProblemStream
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.memory import Holdings, MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer, peak_flops_per_second, rates
from megatron_rlt.metrics.progress import Progress
from megatron_rlt.metrics.reduce import largest
from megatron_rlt.metrics.writer import MetricsWriter
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.export import save_hf_folder
from megatron_rlt.parallel.platform import device_name, world
from megatron_rlt.policy.policy import Policy
from megatron_rlt.store.run_folder import check_run_folder, write_run_folder
from megatron_rlt.types import ENDED_EARLY

CHECKPOINTS, EXPORT = "checkpoints", "hf"
"""Folders in the run folder."""


class SampledAhead(Protocol):
    """What exists of the next step before it begins."""

    def state_bytes(self) -> bytes:
        """All of it, empty if there is nothing; collective."""

    def load_state_bytes(self, data: bytes) -> None:
        """Continue with it; collective."""


@dataclass(frozen=True)
class TrainingState:
    """All that changes while a run trains: what a checkpoint holds."""

    policy: Policy
    reference: LanguageModel | None
    stream: ProblemStream
    ahead: SampledAhead | None = None  # None: every step begins with nothing but the state above

    @property
    def models(self) -> dict[str, LanguageModel]:
        models = {POLICY: self.policy.model}
        return models if self.reference is None else models | {"reference": self.reference}

    @contextmanager
    def on_device(self, *, changes: bool) -> Iterator[None]:
        """A turn of all models, to read or to overwrite their weights."""
        with ExitStack() as turns:
            for model in self.models.values():
                turns.enter_context(model.on_device(changes=changes))
            yield


class TrainingRun:
    """One start of the program on one run folder. Create it first, before data and models.

    The folder becomes this run's when training begins: a run that was refused for its data leaves it free for the
    configuration that mends this.
    """

    def __init__(
        self, config: TrainConfig | SolverConfig | SftConfig, command: str, heartbeat: Heartbeat, *, source_model: Path
    ) -> None:
        """
        Args:
            command: name of the command, kept in the run folder.
            source_model: Hugging Face folder the trained model comes from.

        Raises:
            ValueError: the run folder holds another run.
        """
        self._end = EndRequest()  # first, so that a signal during the set-up is not lost
        check_run_folder(config.output_dir, command, config)
        dist.barrier()  # every rank has looked before one writes
        self._is_writer = dist.get_rank() == 0
        if self._is_writer:
            logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
            logging.getLogger("megatron_rlt").setLevel(logging.INFO)
        self._config, self._command, self._source_model = config, command, source_model
        self._output_dir, self._checkpoint, self._metrics = config.output_dir, config.checkpoint, config.metrics
        self._heartbeat = heartbeat
        self._memory = MemoryLedger()
        self._progress: Progress | None = None
        self.timer = PhaseTimer(heartbeat=self._begin_phase, memory=self._memory)

    def train(
        self,
        state: TrainingState,
        take_step: Callable[[int], dict[str, float]],
        *,
        num_steps: int,
        shown: tuple[str, ...],
    ) -> int:
        """Take all steps that are not done yet. Collective; returns the exit status.

        Args:
            take_step: takes the step of a number (from 0) and returns its metrics, the same on every rank.
            num_steps: steps of the whole run.
            shown: metrics that a person watches, at the steps that have them.
        """
        if self._is_writer:
            write_run_folder(self._output_dir, self._command, self._config, world_size=dist.get_world_size())
        start = self._resume(state)
        if start < num_steps:
            self._remove_export()
        writer = MetricsWriter(
            self._output_dir,
            is_writer=self._is_writer,
            resumed_step=start,
            tensorboard=self._metrics.tensorboard,
            wandb=self._metrics.wandb,
        )
        self._progress = Progress(
            title=self._command,
            first_step=start,
            num_steps=num_steps,
            console=Console() if self._metrics.progress else None,
            is_reporter=self._is_writer,
        )
        with self._progress as progress:
            for number in range(start, num_steps):
                metrics = take_step(number)
                measured = largest(self.timer.take() | self._memory.take(), world())
                metrics |= measured | self._rates(measured)
                writer.log(number + 1, metrics)
                progress.finish_step(number + 1, {name: metrics[name] for name in shown if name in metrics})
                ended, is_last = self._end.agreed(), number + 1 == num_steps
                if ended or is_last or (number + 1) % self._checkpoint.interval_steps == 0:
                    self._save(state, number + 1)
                if ended and not is_last:
                    writer.close()
                    return ENDED_EARLY
        writer.close()
        self._export(state)
        return 0

    def watch_memory(self, ask: Callable[[], Holdings]) -> None:
        """Log memory by kind: `ask` tells what this rank's owners held since it was asked before."""
        self._memory.watch(ask)

    def _rates(self, measured: dict[str, float]) -> dict[str, float]:
        peak = peak_flops_per_second(self._metrics.peak_flops_per_second, device_name())
        return rates(measured, num_devices=dist.get_world_size(), peak_flops_per_second=peak)

    def on_progress(self, detail: str) -> None:
        """A sign of life within a phase."""
        self._heartbeat.beat(self._heartbeat.phase, detail)

    def _begin_phase(self, name: str) -> None:
        self._heartbeat.beat(name)
        if self._progress is not None:
            self._progress.show_phase(name)

    def _resume(self, state: TrainingState) -> int:
        """Load the newest checkpoint if there is one; returns the number of steps done."""
        with self.timer.phase("resume"):
            info = find_resumable(self._output_dir / CHECKPOINTS, group=world())
            if info is None:
                return 0
            with state.on_device(changes=True):
                loaded = load_training_state(
                    info,
                    models=state.models,
                    optimizer=state.policy.optimizer,
                    scheduler=state.policy.scheduler,
                    layout=state.policy.layout,
                )
            state.stream.load_state_bytes(loaded.shared.data_position)
            if state.ahead is not None:
                state.ahead.load_state_bytes(loaded.shared.sampled_ahead)
            state.policy.num_updates = loaded.num_updates
            state.policy.skipped_in_a_row = loaded.shared.counters["skipped_in_a_row"]
            if loaded.rank_state is not None:
                loaded.rank_state.restore_rng()
            return loaded.step

    def _save(self, state: TrainingState, step: int) -> None:
        sampled_ahead = b""
        if state.ahead is not None:
            with self.timer.phase("rollout"):  # its rest: whoever resumes no longer has the weights that sample it
                sampled_ahead = state.ahead.state_bytes()
        with self.timer.phase("checkpoint"), state.on_device(changes=False):
            save_training_state(
                self._output_dir / CHECKPOINTS,
                step,
                models=state.models,
                optimizer=state.policy.optimizer,
                scheduler=state.policy.scheduler,
                rank_state=RankState.capture(extra=b""),
                shared_state=SharedState(
                    state.stream.state_bytes(), {"skipped_in_a_row": state.policy.skipped_in_a_row}, sampled_ahead
                ),
                num_updates=state.policy.num_updates,
                layout=state.policy.layout,
                keep_last=self._checkpoint.keep_last,
            )

    def _remove_export(self) -> None:
        """Remove what an earlier end of this run exported, before training goes on.

        Killed at any moment, the run then has its final weights there or none; never those of fewer steps.
        """
        if self._is_writer and (self._output_dir / EXPORT).exists():
            shutil.rmtree(self._output_dir / EXPORT)

    def _export(self, state: TrainingState) -> None:
        """Write the final weights, unless they are there already."""
        target = self._output_dir / EXPORT
        is_there = target.exists()
        dist.barrier()  # every rank has looked
        if is_there or not self._checkpoint.export_hf:
            return
        with self.timer.phase("export"):
            save_hf_folder(
                state.policy.model,
                Architecture.from_folder(self._source_model),
                self._source_model,
                target,
                state.policy.layout,
                max_shard_bytes=self._checkpoint.max_shard_bytes,
            )
