"""`parity`: real models in real layouts agree with transformers; a mismatch is found, named and ends with status 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.commands.parity import ParityConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.parity.run import PARITY_FILE, run_parity
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.types import StoppedError
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs, tiny_inputs
from tests.ranks import run_ranks

FLOAT32_BOUND = 1e-4  # what fp32 products of another shape differ by in a whole model is some 1e-5
COMPLAINT = "log-probs of the same tokens differ by more than parity.max_gap="
TRANSFORMERS, MEGATRON, SAMPLING = "transformers", "megatron", "megatron sampling"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("parity"), num_rows=6)


def _settings(inputs: TinyInputs, *further: str) -> list[str]:
    return [*SMALL_RL, *inputs.for_train, "parity.num_rows=4", f"parity.max_gap={FLOAT32_BOUND}", *further]


def _gaps(folder: Path) -> dict[tuple[str, tuple[str, ...]], dict[str, Any]]:
    found = json.loads((folder / PARITY_FILE).read_text())
    return {(gap["model"], tuple(gap["sides"])): gap for gap in found}


def test_the_command_compares_every_pair_in_the_jobs_layouts(tmp_path: Path, inputs: TinyInputs) -> None:
    attempt = Command("parity", RL_CONFIG, _settings(inputs), tmp_path / "run").finish()
    assert attempt.status == 0, attempt.errors
    gaps = _gaps(tmp_path / "run")
    assert list(gaps) == [
        ("teacher", (TRANSFORMERS, MEGATRON)),
        ("teacher", (TRANSFORMERS, SAMPLING)),
        ("teacher", (MEGATRON, SAMPLING)),
        ("student", (TRANSFORMERS, MEGATRON)),
    ]
    for gap in gaps.values():
        assert 0 <= gap["p50"] <= gap["p99"] <= gap["maximum"] < FLOAT32_BOUND
        assert abs(gap["values"][0] - gap["values"][1]) == pytest.approx(gap["maximum"], abs=1e-6)
        assert gap["num_tokens"] >= 4
        assert gap["token"] not in ("", None)
        assert len(gap["context"]) > 0
    assert gaps["teacher", (TRANSFORMERS, MEGATRON)]["maximum"] > 0, "two programs, not one asked twice"


def _several(inputs: TinyInputs, folder: Path) -> dict[str, str | int]:
    """Status, or the complaint, by case."""
    cases = {
        "given": ["parity.completions=given", "teacher.layout={pp: 2}", "student.layout={tp: 2, sp: true}"],
        "nucleus": ["rollout.top_p=0.5"],
    }
    found: dict[str, str | int] = {}
    for name, settings in cases.items():
        config = load_config(ParityConfig, RL_CONFIG, [*_settings(inputs, *settings), f"output_dir={folder / name}"])
        try:
            found[name] = run_parity(config, Heartbeat(rank=0, folder=folder, timeout_seconds=600))
        except StoppedError as stopped:
            found[name] = str(stopped)
    return found


def test_given_completions_in_other_layouts_agree_and_a_nucleus_is_named(tmp_path: Path, inputs: TinyInputs) -> None:
    for found in run_ranks(_several, 2, inputs, tmp_path):
        assert found["given"] == 0
        complaint = str(found["nucleus"])
        assert complaint.startswith(f"{COMPLAINT}{FLOAT32_BOUND:g}: ")
        assert [pair.split(" by ")[0] for pair in complaint.split(": ", 1)[1].split("; ")] == [
            f"teacher: {TRANSFORMERS} and {SAMPLING}",
            f"teacher: {MEGATRON} and {SAMPLING}",
        ]
    given = _gaps(tmp_path / "given")
    assert list(given) == [("teacher", (TRANSFORMERS, MEGATRON)), ("student", (TRANSFORMERS, MEGATRON))]
    nucleus = _gaps(tmp_path / "nucleus")["teacher", (MEGATRON, SAMPLING)]
    # Half the mass, renormalized, is at most twice as probable: ln 2, and not much less somewhere.
    assert 0.5 < nucleus["maximum"] < 0.694
    assert nucleus["values"][0] < nucleus["values"][1]


def test_a_bound_too_small_is_status_1_and_a_row_without_a_trace_status_2_in_one_line(
    tmp_path: Path, inputs: TinyInputs
) -> None:
    alone = ("world_size=1", "teacher.layout={tp: 1, sp: false}")
    small = _settings(inputs, *alone, "parity.max_gap=1e-12")
    attempt = Command("parity", RL_CONFIG, small, tmp_path / "small").finish()
    (line,) = attempt.errors.splitlines()
    assert attempt.status == 1
    assert line.startswith(f"megatron-rlt: error: {COMPLAINT}1e-12: ")

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "bare", "question": "5 +5", "solution": "3"}) + "\n")
    bare = _settings(inputs, *alone, "parity.completions=given", f"data.path={rows}")
    attempt = Command("parity", RL_CONFIG, bare, tmp_path / "bare").finish()
    assert attempt.errors == (
        "megatron-rlt: error: parity.completions=given: problem bare has no reasoning_trace; add one, or set"
        " parity.completions=sampled\n"
    )
    assert attempt.status == 2
