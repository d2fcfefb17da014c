"""A trainer that is killed, command and vLLM's servers as a user has them: neither preloaded nor with a plugin."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, ROOT, tiny_inputs
from tests.vllm.policies import assert_nothing_runs
from tests.vllm.server_plugin import PYTHONPATH
from tests.vllm.test_train import NUM_STEPS, SERVER, SETTINGS
from tools.demo.make_assets import NUM_VLLM_HEADS


def test_a_killed_trainer_leaves_no_server_and_a_second_start_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=16, num_heads=NUM_VLLM_HEADS)
    run = tmp_path / "run"
    arguments = [*SETTINGS, *SERVER, *inputs.for_train, "checkpoint.interval_steps=1", f"output_dir={run}"]
    started = subprocess.Popen(
        [sys.executable, "-m", "megatron_rlt", "train", str(RL_CONFIG), *arguments], cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 200.0
    while len(read_metrics(run)) < 2:
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.1)
    ranks = psutil.Process(started.pid).children(recursive=True)
    first = next(one for one in ranks if "server_guard" in " ".join(one.cmdline())).parent()
    assert first is not None
    first.send_signal(signal.SIGKILL)
    assert started.wait(60.0) == 1
    assert_nothing_runs(tmp_path, [one.pid for one in ranks])
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    ended = Command("train", RL_CONFIG, [*arguments[:-1]], run).finish()
    assert ended.status == 0, ended.errors
    assert ended.first_step is not None
    assert ended.first_step > 1, "it continues"
    assert [step["step"] for step in read_metrics(run)] == list(range(1, NUM_STEPS + 1))
    assert_nothing_runs(tmp_path)
