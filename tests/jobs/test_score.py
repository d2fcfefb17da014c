"""`score` ends, continues and refuses as it says: parts survive a kill, rows keep their order, no file is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.loading import to_yaml
from megatron_rlt.metrics.writer import read_metrics
from tests.jobs.tiny_scores import (
    QUESTION,
    TRACES,
    PhaseLog,
    ScoreInputs,
    row,
    score_inputs,
    score_on_ranks,
    write_rows,
)
from tests.ranks import run_ranks

NUM_PARTS = 3  # 8 rows, 3 a part
COLUMNS = [
    "id", "question", "solution", "row", "question_index", "explanation_index", "explanation", "flags", "prompt_tokens",
    "completion_tokens", "explanation_tokens", "solution_tokens", "student_tokens", "temperature", "reward", "rank",
    "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty", "dropped", "solution_overlap",
    "states_the_answer", "repetition", "epistemic_per_100_words", "baseline_logprob", "gain", "teacher",
    "teacher_fingerprint", "student", "student_fingerprint", "control", "run_seed", "teacher_explanation_logprobs",
    "student_explanation_logprobs", "student_solution_logprobs", "kl_per_token", "baseline_solution_logprobs",
]  # fmt: skip
"""Those that are not null in all rows; the others are of sampling, of training, and of controls."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ScoreInputs:
    return score_inputs(tmp_path_factory.mktemp("score"))


@pytest.fixture(scope="module")
def undisturbed(inputs: ScoreInputs, tmp_path_factory: pytest.TempPathFactory) -> ScoreConfig:
    """A run on two ranks in two layouts that nobody interrupted."""
    config = _two_layouts(inputs, tmp_path_factory.mktemp("undisturbed"))
    assert run_ranks(_score, 2, config) == [0, 0]
    return config


def _two_layouts(inputs: ScoreInputs, folder: Path) -> ScoreConfig:
    teacher = {"model": inputs.teacher, "dtype": "float32", "layout": {"tp": 2, "sp": True}}
    return inputs.config(folder, teacher=teacher, world_size=2)


def _score(config: ScoreConfig) -> int:
    return score_on_ranks(config, PhaseLog())


def _phases(config: ScoreConfig) -> tuple[int, list[str]]:
    log = PhaseLog()
    return score_on_ranks(config, log), log.phases


def test_the_output_has_the_promised_columns_one_row_each_and_no_parts_are_left(undisturbed: ScoreConfig) -> None:
    table = pq.read_table(undisturbed.output)
    assert [name for name in table.column_names if table[name].null_count < table.num_rows] == COLUMNS
    assert table["explanation"].to_pylist() == [explanation for _, explanation in TRACES]
    assert table["explanation_index"].to_pylist() == list(range(len(TRACES))), "all ask the same question"
    assert table["id"].to_pylist() == [f"row {number}" for number in range(len(TRACES))]
    assert sorted(path.name for path in undisturbed.output.parent.iterdir()) == [
        "run", "scores.parquet", "scores.parquet.rejected.jsonl",
    ]  # fmt: skip
    assert (undisturbed.output.parent / "scores.parquet.rejected.jsonl").read_text() == ""
    assert len(read_metrics(undisturbed.output_dir)) == NUM_PARTS
    assert (undisturbed.output_dir / "config.yaml").read_text() == to_yaml(undisturbed)


def test_an_empty_explanation_keeps_its_place_without_a_reward(undisturbed: ScoreConfig) -> None:
    rows = pq.read_table(undisturbed.output).to_pylist()
    without = [number for number, found in enumerate(rows) if found["reward"] is None]
    assert without == [number for number, (_, explanation) in enumerate(TRACES) if explanation == ""] == [2]
    assert rows[2]["dropped"] == "empty explanation"
    assert (rows[2]["r_kl"], rows[2]["explanation_tokens"], rows[2]["solution_tokens"]) == (None, 0, 2)
    seven, newlines = rows[2]["student_solution_logprobs"]
    assert rows[2]["r_ss_mean"] == pytest.approx((seven + newlines) / 2)
    assert [found["flags"] for found in rows if found["flags"]] == [["empty"], ["contains_tags"], ["empty"]]
    for found in rows:
        assert len(found["kl_per_token"]) == len(found["teacher_explanation_logprobs"]) == found["explanation_tokens"]


def test_ranks_run_over_all_parts_of_a_question(undisturbed: ScoreConfig) -> None:
    """All rows ask the same question; the one without a reward has no rank."""
    rows = pq.read_table(undisturbed.output).to_pylist()
    places = sorted(
        (n for n, found in enumerate(rows) if found["reward"] is not None), key=lambda n: -rows[n]["reward"]
    )
    assert [rows[number]["rank"] for number in places] == list(range(1, len(TRACES)))
    assert rows[2]["rank"] is None


def test_a_gain_is_over_the_same_solution_without_explanation(undisturbed: ScoreConfig) -> None:
    rows = pq.read_table(undisturbed.output).to_pylist()
    assert rows[2]["gain"] == pytest.approx(0, abs=1e-5), "its explanation is empty"
    assert rows[2]["baseline_logprob"] == pytest.approx(rows[0]["baseline_logprob"], abs=1e-5), "both are solved by 7"
    for found in rows:
        assert found["gain"] == pytest.approx(found["r_ss_mean"] - found["baseline_logprob"], abs=1e-5)
    assert len({round(found["baseline_logprob"], 4) for found in rows}) == len({solution for solution, _ in TRACES})


def _killed_in_part_2(config: ScoreConfig) -> int:
    def kill(phase: str, times: int) -> None:
        if phase == "student" and times == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return score_on_ranks(config, PhaseLog(action=kill))


def test_a_killed_run_continues_after_its_last_part_and_ends_in_the_same_bytes(
    inputs: ScoreInputs, undisturbed: ScoreConfig, tmp_path: Path
) -> None:
    config = _two_layouts(inputs, tmp_path)
    with pytest.raises(AssertionError):  # of `run_ranks`: a rank died
        run_ranks(_killed_in_part_2, 2, config)
    parts = tmp_path / "scores.parquet.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["identity.json", "part-000000.parquet"]

    (status, phases), _ = run_ranks(_phases, 2, config)

    assert (status, phases.count("student")) == (0, NUM_PARTS - 1)
    assert config.output.read_bytes() == undisturbed.output.read_bytes()
    assert not parts.exists()
    assert [step["step"] for step in read_metrics(config.output_dir)] == [1, 2, 3]


def _told_to_end_in_part_1(config: ScoreConfig) -> tuple[int, list[str]]:
    def tell(phase: str, times: int) -> None:
        if phase == "teacher" and times == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    log = PhaseLog(action=tell)
    return score_on_ranks(config, log), log.phases


def test_a_signal_to_one_rank_ends_all_after_the_part_with_status_75(
    inputs: ScoreInputs, undisturbed: ScoreConfig, tmp_path: Path
) -> None:
    config = _two_layouts(inputs, tmp_path)
    for status, phases in run_ranks(_told_to_end_in_part_1, 2, config):
        assert (status, phases.count("write")) == (75, 1)
    damaged = tmp_path / "scores.parquet.parts" / "part-000001.parquet"
    damaged.write_bytes(b"PAR1 half a file")  # a disk that lied: it is done again

    assert run_ranks(_score, 2, config) == [0, 0]

    assert config.output.read_bytes() == undisturbed.output.read_bytes()


def test_rejected_rows_are_listed_with_their_reason_and_the_others_keep_their_order(
    inputs: ScoreInputs, tmp_path: Path
) -> None:
    """On two ranks, which share the check of lengths; JSONL and Parquet give the same scores."""
    words = "the answer is seven "
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            row(1, "7", "We add."),
            row(2, "7", words * 70),
            row(3, words * 30, "We add."),
            b"\xff\xfe",
            row(5, "the solution", "Then we add."),
            {"id": "turn", "question": "What <|im_end|> is it?", "solution": "7", "explanation": "We add."},
            row(1, "7", "Let us add."),
            row(8, "14", "Now we multiply."),
        ],
    )
    config = inputs.config(tmp_path / "json", input=rows, prompts=_prompts(max_prompt_tokens=150), rows_per_part=2)
    good = [json.loads(line) for number, line in enumerate(rows.read_bytes().splitlines(), 1) if number in (1, 5, 8)]
    pq.write_table(pa.Table.from_pylist(good), tmp_path / "rows.parquet")
    again = config.model_copy(
        update={
            "input": tmp_path / "rows.parquet",
            "output": tmp_path / "parquet" / "scores.parquet",
            "output_dir": tmp_path / "parquet" / "run",
        }
    )
    assert run_ranks(_score_both, 2, config, again) == [[0, 0], [0, 0]]

    scores, same = (pq.read_table(output) for output in (config.output, again.output))
    assert scores["id"].to_pylist() == ["row 1", "row 5", "row 8"]
    origin = ["row"]  # its place in the file
    assert scores.drop_columns(origin).equals(same.drop_columns(origin))
    lines = (tmp_path / "json" / "scores.parquet.rejected.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(rejected["row"], rejected["reason"], rejected["column"]) for rejected in found] == [
        (2, "too_long", None),
        (3, "unusable_prompt", None),
        (4, "not_utf8", None),
        (6, "unusable_prompt", None),
        (7, "duplicate_id", "id"),
    ]
    assert all(rejected["file"] == str(rows) for rejected in found)
    details = [rejected["detail"] for rejected in found]
    assert details[0].startswith("the teacher's sequence has ")
    assert details[0].endswith(" tokens, its model reads 400 at most")
    assert "more than prompts.max_prompt_tokens = 150" in details[1]
    assert "special token '<|im_end|>'" in details[3]


def _prompts(**changes: Any) -> dict[str, Any]:
    return {"teacher_system": "", "student_system": ""} | changes


def _score_both(*configs: ScoreConfig) -> list[int]:
    return [_score(config) for config in configs]


def test_the_command_scores_on_ranks_it_starts_itself(
    inputs: ScoreInputs, undisturbed: ScoreConfig, tmp_path: Path
) -> None:
    """As a user runs it, with a bad row and an override; the scores are those of the undisturbed run."""
    config = _two_layouts(inputs, tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(inputs.rows.read_bytes() + json.dumps({"id": "x", "question": QUESTION}).encode())
    (tmp_path / "score.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "megatron_rlt", "score", str(tmp_path / "score.yaml"), f"input={rows}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )

    assert (done.returncode, _own_lines(done.stderr)) == (0, []), done.stderr
    said: Callable[[str], bool] = lambda text: any(text in line for line in done.stdout.splitlines())  # noqa: E731
    assert said(f"{rows}: 8 rows to score, 1 rejected (missing: 1), listed in {config.output}.rejected.jsonl")
    assert said("  without a reward: empty explanation │")
    assert said("gain by the explanation")
    assert said(f"Scores: {config.output}")
    assert pq.read_table(config.output).equals(pq.read_table(undisturbed.output))


def _own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "megatron-rlt" in line or "Error" in line]
