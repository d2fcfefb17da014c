"""The loop around training steps: resume, log, save, end on request, export."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megatron_rlt.checkpoint.folders import check_newest_layout, find_resumable
from megatron_rlt.checkpoint.training_state import load_training_state, planned_layout
from megatron_rlt.config.commands.rlvr import RlvrConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.folders.kind import WRITTEN, Kind
from megatron_rlt.jobs.run.export import export_model
from megatron_rlt.jobs.run.fingerprints import training_contents
from megatron_rlt.jobs.run.frame import RunFrame, log_to_stdout
from megatron_rlt.jobs.run.saves import Saves
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.training_state import SKIPPED, TrainingState
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.memory import MemoryUsage
from megatron_rlt.parallel.platform import world
from megatron_rlt.store.run_folder import check_contents, check_run_folder, write_run_folder
from megatron_rlt.types import ENDED_EARLY
from megatron_rlt.whole_files import discard

CHECKPOINTS = "checkpoints"
"""Folder in the run folder; exports stand beside it, each under the name of its kind."""


class TrainingRun:
    """One process of a run in its run folder. Create it before data and models.

    It claims the folder only when training begins, so that a run that fails on its data leaves the folder free.
    """

    def __init__(
        self, config: TrainConfig | RlvrConfig | SftConfig, command: str, heartbeat: Heartbeat, *, trained: str
    ) -> None:
        """`trained` is the section of the model that is trained. Collective.

        Raises ValueError if the run folder holds another run, one with other models under the same paths, or one whose
        newest checkpoint cannot be resumed in this layout.
        """
        self._end = EndRequest(config.output_dir)  # first, so that no signal during the setup is lost
        check_run_folder(config.output_dir, command, config)
        self._contents = training_contents(config.models, trained, heartbeat.on_progress)
        check_contents(config.output_dir, self._contents)
        check_newest_layout(
            config.output_dir / CHECKPOINTS, planned_layout(config.models[trained].layout, config.world_size)
        )
        dist.barrier()  # every rank checks before one writes
        self._is_writer = dist.get_rank() == 0
        log_to_stdout()
        self._config, self._command, self._source_model = config, command, config.models[trained].model
        self._output_dir, self._checkpoint = config.output_dir, config.checkpoint
        self._frame = RunFrame(config.metrics, heartbeat)
        self.timer, self.on_progress = self._frame.timer, heartbeat.on_progress
        self._saves = Saves(
            config.checkpoint,
            self._output_dir / CHECKPOINTS,
            end=self._end,
            timer=self.timer,
            timeout_seconds=config.watchdog.timeout_seconds,
        )

    def train(
        self,
        state: TrainingState,
        take_step: Callable[[int], dict[str, float]],
        *,
        num_steps: int,
        shown: tuple[str, ...],
    ) -> int:
        """Run the remaining ones of `num_steps` steps. Collective; returns the exit status.

        Args:
            take_step: runs the step of this number (from 0); returns its metrics, equal on every rank.
            shown: names of the metrics to display, where they exist.
        """
        if self._is_writer:
            write_run_folder(
                self._output_dir,
                self._command,
                self._config,
                world_size=dist.get_world_size(),
                contents=self._contents,
            )
        start = self._resume(state)
        if start < num_steps:
            self._remove_export()
        elif self._is_writer:
            print(f"Nothing to do: {self._output_dir} holds {start} steps already, and num_steps is {num_steps}")
        with (
            self._frame.pieces(
                self._command, self._output_dir, piece="step", num_done=start, count=num_steps, shown=shown
            ) as record,
            self._saves.completed(),
        ):
            for number in range(start, num_steps):
                with self._end.step(number + 1):
                    record(number + 1, take_step(number) | self._saves.take_metrics())
                self._saves.look()
                is_last, is_due = number + 1 == num_steps, (number + 1) % self._checkpoint.interval_steps == 0
                ended = self._end.agreed(num_saves=1 + (is_due or self._saves.is_writing))
                if ended or is_last or is_due:
                    self._saves.save(state, number + 1)
                if ended and not is_last:
                    return ENDED_EARLY
        self._export(state)
        return 0

    def watch_memory(self, query: Callable[[], MemoryUsage]) -> None:
        """Log memory by category; `query` returns this rank's peak usage since its previous call."""
        self._frame.memory.watch(query)

    def _resume(self, state: TrainingState) -> int:
        """Load the newest checkpoint, if any; returns the number of steps done."""
        with self.timer.phase("resume"):
            info = find_resumable(self._output_dir / CHECKPOINTS, group=world())
            if info is None:
                return 0
            with state.onloaded(changes=True):
                loaded = load_training_state(
                    info, models=state.models, optimizer=state.policy.optimizer, scheduler=state.policy.scheduler
                )
            state.stream.load_state_bytes(loaded.shared.data_position)
            if state.ahead is not None:
                state.ahead.load_state_bytes(loaded.shared.sampled_ahead)
            if state.measured is not None:
                state.measured.load_counters(loaded.shared.counters)
            state.policy.num_updates = loaded.num_updates
            state.policy.skipped_in_a_row = loaded.shared.counter(SKIPPED)
            if loaded.rank_state is not None:
                loaded.rank_state.restore_rng()
            return loaded.step

    def _remove_export(self) -> None:
        """Remove exports of an earlier, shorter run: a killed run must not leave weights of fewer steps there."""
        if not self._is_writer:
            return
        for export in (self._output_dir / kind for kind in WRITTEN):
            if export.is_symlink():
                export.unlink()  # what it names was not written by this run
            elif export.exists():
                discard(export)

    def _export(self, state: TrainingState) -> None:
        """Write the final weights as each kind of folder, unless they exist already."""
        kinds = [Kind(kind) for kind in self._checkpoint.export if not (self._output_dir / kind).exists()]
        dist.barrier()  # every rank has checked
        for kind in kinds:
            with self.timer.phase("export"):
                export_model(
                    state.policy.model,
                    self._source_model,
                    self._output_dir / kind,
                    kind,
                    max_shard_bytes=self._checkpoint.max_shard_bytes,
                )
