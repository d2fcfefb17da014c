"""Real runs of the demo's tiny model on two ranks: inputs, settings, stopping."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.data.prepare import prepare_shards
from megatron_rlt.jobs.sft import run_sft
from megatron_rlt.jobs.train.run import run_train
from megatron_rlt.launch.watchdog import Heartbeat
from tools.demo.make_assets import NUM_HEADS, make_assets

ROOT = Path(__file__).parents[2]
RL_CONFIG = ROOT / "configs" / "demo" / "rlt_2cpu_tp2sp_dp2.yaml"
SCORER_CONFIG = ROOT / "configs" / "demo" / "scorer_2cpu_dp2.yaml"
WARMUP_CONFIG = ROOT / "configs" / "demo" / "warmup_2cpu_dp2.yaml"

ENDED_EARLY = 75
# The demo's RL settings made small: 2 questions x 4 completions of at most 10 tokens, steps large enough to matter.
SMALL_RL = (
    "num_steps=6",
    "grpo.questions_per_step=2",
    "grpo.group_size=4",
    "grpo.micro_batch_size=2",
    "rollout.max_completion_tokens=10",
    "optimizer.lr=2e-3",
    "optimizer.warmup_fraction=0",
    "data.shuffle_buffer_size=4",
    "metrics.tensorboard=false",
)
SMALL_SFT = (
    "num_steps=4",
    "global_batch_size=4",
    "micro_batch_size=2",
    "data.shuffle_buffer_size=4",
    "metrics.tensorboard=false",
)


@dataclass(frozen=True)
class TinyInputs:
    """Where a run's inputs lie."""

    model: Path
    shards: Path

    @property
    def for_train(self) -> list[str]:
        return [f"teacher.model={self.model}", f"student.model={self.model}", f"data.path={self.shards}"]

    @property
    def for_sft(self) -> list[str]:
        return [f"model.model={self.model}", f"data.path={self.shards}"]


def tiny_inputs(folder: Path, *, num_rows: int, num_heads: int = NUM_HEADS) -> TinyInputs:
    """The demo's untrained model and so many of its rows, prepared."""
    assets = make_assets(folder / "assets", seed=0, num_rows=num_rows, num_heads=num_heads)
    shards = folder / "shards"
    prepare_shards(PrepareConfig(input=(str(assets.train),), output_dir=shards, rows_per_shard=max(4, num_rows // 4)))
    return TinyInputs(assets.model, shards)


def train_here(output_dir: Path, settings: list[str], *, stop_after: int | None = None) -> int:
    """`train` with the demo's settings and these, in this process, on the ranks of a test; returns its status.

    With `stop_after` it gets a SIGTERM in the step of that number, counted from 1 in each call.
    """
    config = load_config(TrainConfig, RL_CONFIG, [*settings, f"output_dir={output_dir}"])
    return run_train(config, _heartbeat(config, phase="rollout", stop_after=stop_after))


def sft_here(
    output_dir: Path, settings: list[str], *, config_file: Path = SCORER_CONFIG, stop_after: int | None = None
) -> int:
    """As `train_here`, for `sft`."""
    config = load_config(SftConfig, config_file, [*settings, f"output_dir={output_dir}"])
    return run_sft(config, _heartbeat(config, phase="data", stop_after=stop_after))


def _heartbeat(config: JobConfig, *, phase: str, stop_after: int | None) -> Heartbeat:
    """Sends this process a SIGTERM when the phase, one a step, comes for the n-th time; only the last rank is told."""
    beats = iter(range(1, 1_000_000))

    def on_phase(name: str) -> None:
        if name == phase and next(beats) == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return Heartbeat(rank=dist.get_rank(), folder=config.output_dir, timeout_seconds=600.0, on_phase=on_phase)


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run folder, made by one rank; collective."""
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()
    return target
