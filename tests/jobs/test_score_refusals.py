"""What `score` refuses: other runs on its output, and files that cannot be used; each by name, before a model loads."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.given_files import lines_of
from tests.jobs.tiny_scores import (
    PhaseLog,
    ScoreInputs,
    row,
    score_inputs,
    score_on_ranks,
    write_rows,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ScoreInputs:
    return score_inputs(tmp_path_factory.mktemp("score"))


def _phases(config: ScoreConfig) -> tuple[int, list[str]]:
    log = PhaseLog()
    return score_on_ranks(config, log), log.phases


def _refusal(config: ScoreConfig) -> str:
    """What is printed, line by line."""
    log = PhaseLog()
    with pytest.raises(ValueError, match=r".") as caught:
        score_on_ranks(config, log)
    assert "load" not in log.phases, "a refusal must come before a model loads"
    return "\n".join(lines_of(caught.value))


def _interrupted(config: ScoreConfig) -> None:
    def tell(phase: str, times: int) -> None:
        if phase == "teacher":
            os.kill(os.getpid(), signal.SIGTERM)

    assert score_on_ranks(config, PhaseLog(action=tell)) == 75


def _refusals_of_other_runs(inputs: ScoreInputs, folder: Path) -> dict[str, str]:
    config = inputs.config(folder / "a")
    _interrupted(config)
    elsewhere = {"output_dir": folder / "b"}
    refused = {
        "run folder": _refusal(config.model_copy(update={"temperature": 1.0})),
        "parts, temperature": _refusal(config.model_copy(update={"temperature": 1.0} | elsewhere)),
        "parts, rows": _refusal(config.model_copy(update={"rows_per_part": 4} | elsewhere)),
    }
    text = inputs.rows.read_bytes()
    inputs.rows.write_bytes(text.replace(b"seven", b"eight", 1))
    refused["parts, input"] = _refusal(config)
    inputs.rows.write_bytes(text)
    weights = inputs.student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused["parts, student"] = _refusal(config)
    weights.write_bytes(content)  # at another time: it is the content that counts

    assert score_on_ranks(config, PhaseLog()) == 0
    written = config.output.stat().st_mtime_ns
    status, phases = _phases(config.model_copy(update=elsewhere))
    assert (status, phases) == (0, ["validate"]), "the same again has nothing to do"
    refused["output"] = _refusal(config.model_copy(update={"temperature": 1.0} | elsewhere))
    assert config.output.stat().st_mtime_ns == written
    return refused


def test_a_changed_configuration_input_or_model_is_refused_by_name(inputs: ScoreInputs, tmp_path: Path) -> None:
    own = ScoreInputs(inputs.teacher, tmp_path / "student", tmp_path / "rows.jsonl")
    shutil.copytree(inputs.student, own.student)
    shutil.copy(inputs.rows, own.rows)
    (refused,) = run_ranks(_refusals_of_other_runs, 1, own, tmp_path)

    parts, output = tmp_path / "a" / "scores.parquet.parts", tmp_path / "a" / "scores.parquet"
    assert "temperature was 0.7, now 1.0. Put the values back" in refused["run folder"]
    expected = f"output: {parts} holds rows of another run: temperature was 0.7, now 1.0. Nothing is overwritten"
    assert refused["parts, temperature"].startswith(expected)
    assert "run: rows_per_part was 3, now 4. " in refused["parts, rows"]
    assert "run: content of input (SHA-256) was " in refused["parts, input"]
    assert "run: content of student was " in refused["parts, student"]
    assert refused["output"].startswith(f"output: {output} holds rows of another run: temperature was 0.7, ")


def _bad_files(inputs: ScoreInputs, folder: Path) -> dict[str, str]:
    refused = {}
    not_scores = inputs.config(folder / "not scores")
    not_scores.output.parent.mkdir()
    pq.write_table(pa.table({"id": ["a"]}), not_scores.output)
    refused["not scores"] = _refusal(not_scores)
    not_parts = inputs.config(folder / "not parts")
    (not_parts.output.parent / "scores.parquet.parts").mkdir(parents=True)
    (not_parts.output.parent / "scores.parquet.parts" / "mine.txt").touch()
    refused["not parts"] = _refusal(not_parts)
    refused["no rows"] = _refusal(inputs.config(folder / "1", input=write_rows(folder / "empty.jsonl", [])))
    bad = write_rows(folder / "bad.jsonl", [row(0, "7", None), row(1, 7, "x"), b"[]"])
    refused["no usable row"] = _refusal(inputs.config(folder / "2", input=bad))
    pq.write_table(pa.table({"id": ["a"], "question": ["q"], "solution": ["s"]}), folder / "short.parquet")
    refused["columns"] = _refusal(inputs.config(folder / "3", input=folder / "short.parquet"))
    (folder / "broken.parquet").write_bytes(b"PAR1")
    refused["broken"] = _refusal(inputs.config(folder / "4", input=folder / "broken.parquet"))
    return refused


def test_files_that_cannot_be_used_are_refused_by_name_before_a_model_loads(
    inputs: ScoreInputs, tmp_path: Path
) -> None:
    (refused,) = run_ranks(_bad_files, 1, inputs, tmp_path)

    output = tmp_path / "not scores" / "scores.parquet"
    assert refused["not scores"].startswith(f"output: {output} exists and was not written by this command; ")
    assert ".parts exists and was not written by this command; " in refused["not parts"]
    assert refused["no rows"] == f"no usable row in {tmp_path}/empty.jsonl: it has no rows"
    assert refused["no usable row"].splitlines() == [
        f"no usable row in {tmp_path}/bad.jsonl: all 3 rows were rejected"
        " (missing: 1, not_an_object: 1, wrong_type: 1); mend them",
        f"  {tmp_path}/bad.jsonl row 1: missing in column 'explanation': absent or null",
        f"  {tmp_path}/bad.jsonl row 2: wrong_type in column 'solution': int instead of text",
        f"  {tmp_path}/bad.jsonl row 3: not_an_object: a JSON list instead of an object",
    ]
    lacks = f"input {tmp_path}/short.parquet lacks the columns explanation and has id, question, solution; "
    assert refused["columns"].startswith(lacks)
    assert f"'{tmp_path}/broken.parquet' is no readable Parquet file" in refused["broken"]
