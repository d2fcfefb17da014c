"""`status` on folders as ranks leave them: how far, who is silent, and which failure came first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlt.cluster.status import status_lines
from megatron_rlt.launch.failures import Failure, Kind
from megatron_rlt.launch.records import Records

_NOW = 10_000.0


def _run(folder: Path) -> Records:
    """Two ranks in step 4 of 10; a step takes 2 + 3 seconds."""
    (folder / "run.json").write_text(json.dumps({"command": "train", "starts": [{}, {}]}))
    (folder / "config.yaml").write_text("num_steps: 10\n")
    steps = [
        {"step": n, "seconds/rollout": 2.0, "seconds/update": 3.0, "tokens_per_second/rollout": 1234.5}
        for n in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4, "sec')
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    attempt = folder / "attempts" / "7-1"
    (attempt / "ranks").mkdir(parents=True)
    (folder / "attempts" / "latest").symlink_to("7-1")
    records = Records(attempt / "ranks")
    for rank in (0, 1):
        (attempt / "ranks" / f"host-{rank}").write_text(f"node{rank}")
        records.mark_phase(rank, "rollout")
        _sign(records, rank, seconds_ago=2)
    return records


def _sign(records: Records, rank: int, *, seconds_ago: float) -> None:
    records.mark_alive(rank)
    os.utime(records.folder / f"alive-{rank}", (_NOW - seconds_ago, _NOW - seconds_ago))


def test_step_rate_time_left_checkpoint_and_phase(tmp_path: Path) -> None:
    _run(tmp_path)
    lines = status_lines(tmp_path, now=_NOW)
    assert lines[0] == f"run: train in {tmp_path}, started 2 times"
    assert lines[1] == "step: 3 of 10, 5.0 s each, 0:00:35 left"
    assert lines[2] == "tokens per second: rollout 1,234"
    assert lines[3].startswith("checkpoint: step-000002, written ")
    assert lines[4:] == [
        "attempt: 7-1",
        "ranks: 2 started, 0 ended well, 0 failed, 2 not ended",
        "phase: rollout (2 ranks)",
    ]


def test_a_rank_without_a_sign_of_life_is_named(tmp_path: Path) -> None:
    records = _run(tmp_path)
    _sign(records, 1, seconds_ago=95)
    assert status_lines(tmp_path, now=_NOW)[-1] == "silent: rank 1 on node1, for 0:01:35, in rollout"


def test_the_earliest_real_failure_comes_first_and_lost_connections_are_folded(tmp_path: Path) -> None:
    records = _run(tmp_path)
    records.write_failure(Failure(0, "rollout", Kind.CONNECTION, "closed", "trace of 0", 5.0))
    records.write_failure(Failure(1, "update", Kind.ERROR, "RuntimeError: boom", "trace of 1\nboom", 6.0))
    lines = status_lines(tmp_path, now=_NOW)
    start = lines.index("failed first: rank 1 on node1 in phase update: RuntimeError: boom")
    assert lines[start + 1 :] == ["trace of 1", "boom", "then: 1 ranks lost a peer"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("srun: error: node1: task 1: Killed", "rank 1 on node1 in phase rollout: killed by a signal from outside"),
        ("srun: error: node1: tasks 1,3-4: Exited with exit code 9", "exited with exit code 9, no reason given"),
        ("srun: error: Node failure on node1", "no rank: node node1 failed"),
    ],
)
def test_what_a_rank_could_not_record_is_read_from_srun(tmp_path: Path, line: str, named: str) -> None:
    records = _run(tmp_path)
    records.write_failure(Failure(0, "rollout", Kind.CONNECTION, "closed", "trace of 0", 5.0))
    after = "srun: error: node0: task 0: Exited with exit code 1\n"
    (tmp_path / "attempts" / "7-1" / "srun.log").write_text(f"{line}\n{after}")
    lines = status_lines(tmp_path, now=_NOW)
    first = next(text for text in lines if text.startswith("failed first"))
    assert named in first
    assert lines[-1] == "then: 1 ranks lost a peer"


def test_of_stalled_ranks_the_one_without_a_sign_is_the_cause(tmp_path: Path) -> None:
    records = _run(tmp_path)
    _sign(records, 1, seconds_ago=12)
    records.write_failure(Failure(0, "rollout", Kind.STALL, "no progress for 6.0 s", "", 5.0))
    lines = status_lines(tmp_path, now=_NOW)
    assert "failed first: rank 1 on node1 in phase rollout: no sign of life for 10.0 s" in "\n".join(lines)
    assert "then: rank 0 on node0 in phase rollout: no progress for 6.0 s" in lines


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run \(no run.json\); give the output_dir"):
        status_lines(tmp_path, now=_NOW)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.yaml", None, "config.yaml: no such file; the run folder is damaged"),
        *(
            ("metrics.jsonl", f'{{"step": {step}, "seconds/a": {seconds}}}\n', "a line is no record of a step; the run")
            for step, seconds in (("true", "1"), ("1", "-5"), ("1", "1e308"), (f"1{400 * '0'}", "1"), ("1.5", "1"))
        ),
    ],
)
def test_what_no_run_writes_is_called_damage(tmp_path: Path, file: str, content: str | None, says: str) -> None:
    _run(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=says):
        status_lines(tmp_path, now=_NOW)


def test_values_that_are_no_numbers_and_files_that_are_no_ranks_do_not_count(tmp_path: Path) -> None:
    records = _run(tmp_path)
    (records.folder / "host-0.swp").write_text("of an editor")
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "seconds/a": NaN, "tokens": 1{400 * "0"}}}\n')
    lines = status_lines(tmp_path, now=_NOW)
    assert lines[1].startswith("step: 1 of 10, 0.0 s each")
    assert "ranks: 2 started, 0 ended well, 0 failed, 2 not ended" in lines


def test_status_needs_no_torch(tmp_path: Path) -> None:
    """A login node answers at once, also where torch is not installed."""
    _run(tmp_path)
    program = (
        "import sys; from megatron_rlt.cli import main;"
        f" main(['status', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "step: 3 of 10, 5.0 s each, 0:00:35 left"), done.stderr
