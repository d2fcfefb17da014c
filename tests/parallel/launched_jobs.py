"""Jobs that the launcher's tests run on real ranks; by module path, so that started processes find them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.launch.launch import run_job
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.types import ENDED_EARLY


def counts_ranks(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Succeeds if the ranks reach each other."""
    heartbeat.beat("count")
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()} of {int(total)}", flush=True)
    return 0


def raises_on_rank_1(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Rank 1 fails by itself, the others in a collective with it."""
    heartbeat.beat("rollout")
    if dist.get_rank() == 1:
        raise RuntimeError("boom on purpose")
    dist.barrier()
    return 0


def reads_bad_input(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Every rank meets the same fault of the user."""
    load_config(JobConfig, config.output_dir / "missing.yaml", [])
    return 0


def hangs_on_rank_1(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Rank 1 stops without a word, the others wait for it."""
    heartbeat.beat("rollout")
    if dist.get_rank() == 1:
        time.sleep(600)
    heartbeat.beat("scoring", "pack 1 of 1")
    dist.barrier()
    return 0


def freezes_rank_1(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Rank 1 is stopped, as by a file system that hangs, and the others wait for it."""
    heartbeat.beat("rollout")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    heartbeat.beat("scoring")
    dist.barrier()
    return 0


def freezes_all(config: JobConfig, heartbeat: Heartbeat) -> int:
    """No rank is left to notice."""
    heartbeat.beat("rollout")
    dist.barrier()
    time.sleep(1.2 * dist.get_rank())
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def handles_no_signal(config: JobConfig, heartbeat: Heartbeat) -> int:
    """As a job that still loads its model; the ranks write to both streams."""
    print(f"output of {dist.get_rank()}", flush=True)
    print(f"warning of {dist.get_rank()}", file=sys.stderr, flush=True)
    dist.barrier()
    _mark_running(config)
    time.sleep(600)
    return 0


def waits_for_nobody(config: JobConfig, heartbeat: Heartbeat) -> int:
    """No rank notices another's death, and each only takes note of a SIGTERM: like a long kernel."""
    EndRequest(config.output_dir)
    heartbeat.beat("update")
    _mark_running(config)
    time.sleep(600)
    return 0


def runs_until_asked(config: JobConfig, heartbeat: Heartbeat) -> int:
    """Steps until a signal comes, then leaves as a job that saved its state."""
    request = EndRequest(config.output_dir)
    while not request.agreed(num_saves=0):
        heartbeat.beat("step")
        _mark_running(config)
        time.sleep(0.05)
    return ENDED_EARLY


def _mark_running(config: JobConfig) -> None:
    (config.output_dir / f"running-{dist.get_rank()}-{os.getpid()}").touch()


if __name__ == "__main__":
    _, name, folder, world_size, timeout_seconds = sys.argv
    settings = JobConfig.model_validate(
        {"output_dir": Path(folder), "world_size": int(world_size), "watchdog": {"timeout_seconds": timeout_seconds}}
    )
    sys.exit(run_job(globals()[name], settings, settings.world_size))
