"""Jobs of `launched_jobs` on two ranks that the launcher forks: for claims in which a start's seconds have no part."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.launch import local_ranks
from megatron_rlt.launch.launch import run_job
from tests.parallel import launched_jobs
from tests.ranks import forkserver


def start_forked(job: str, folder: Path, *, timeout_seconds: float) -> Any:
    """The launcher's process; its output goes to `output` and `errors` in the folder."""
    process = forkserver().Process(target=_run, args=(job, folder, timeout_seconds))
    process.start()
    return process


def _run(job: str, folder: Path, timeout_seconds: float) -> None:
    for name, descriptor in (("output", 1), ("errors", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore them
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has children
    local_ranks._START_METHOD = "fork"
    tree = {"output_dir": folder, "world_size": 2, "watchdog": {"timeout_seconds": timeout_seconds}}
    sys.exit(run_job(getattr(launched_jobs, job), JobConfig.model_validate(tree), 2))
