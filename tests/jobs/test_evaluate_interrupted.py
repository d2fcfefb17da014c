"""`evaluate` goes on where it was interrupted, and refuses by name what it cannot evaluate."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.metrics.writer import read_metrics
from tests.jobs.tiny_evaluations import (
    EvaluationInputs,
    evaluate_on_ranks,
    evaluation_inputs,
)
from tests.jobs.tiny_scores import PhaseLog, write_rows
from tests.ranks import run_ranks

NUM_PARTS = 4  # 7 questions, 2 a part
GREEDY = {"greedy": True, "num_samples": 1, "max_batch_size": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    return evaluation_inputs(tmp_path_factory.mktemp("evaluate"))


def _results(config: EvaluateConfig) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((config.output_dir / "results.json").read_text())
    return results


def _interrupted_twice(config: EvaluateConfig) -> tuple[int, list[str]]:
    """Told to end in the first part; killed in the third, on the second start."""

    def tell(phase: str, times: int) -> None:
        if phase == "rollout" and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def kill(phase: str, times: int) -> None:
        if phase == "judge" and times == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    log = PhaseLog(action=tell)
    assert (evaluate_on_ranks(config, log), log.phases.count("write")) == (75, 1)
    return evaluate_on_ranks(config, PhaseLog(action=kill)), []


def _with_phases(config: EvaluateConfig) -> tuple[int, list[str]]:
    log = PhaseLog()
    return evaluate_on_ranks(config, log), log.phases


def _both(first: EvaluateConfig, second: EvaluateConfig) -> tuple[tuple[int, list[str]], tuple[int, list[str]]]:
    return _with_phases(first), _with_phases(second)


def test_an_interrupted_run_ends_in_the_same_bytes_and_a_finished_one_has_nothing_to_do(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    disturbed, undisturbed = (inputs.config(tmp_path / name, world_size=2) for name in ("a", "b"))
    with pytest.raises(AssertionError, match=r"died without a traceback|Connection"):
        run_ranks(_interrupted_twice, 2, disturbed)
    parts = sorted(path.name for path in (disturbed.output_dir / "parts").iterdir())
    assert parts == ["identity.json", "part-000000.parquet", "part-000001.parquet"]

    ((status, phases), (other_status, _)), _ = run_ranks(_both, 2, disturbed, undisturbed)

    assert (status, other_status, phases.count("rollout")) == (0, 0, NUM_PARTS - 2)
    verdicts = [config.output_dir / "verdicts.parquet" for config in (disturbed, undisturbed)]
    assert verdicts[0].read_bytes() == verdicts[1].read_bytes()
    assert _results(disturbed) == _results(undisturbed)
    assert [step["step"] for step in read_metrics(disturbed.output_dir)] == [1, 2, 3, 4]
    assert not (disturbed.output_dir / "parts").exists()

    before = (undisturbed.output_dir / "results.json").read_bytes()
    (undisturbed.output_dir / "results.json").unlink()  # a kill just before the end
    ((status, phases),) = run_ranks(_with_phases, 1, undisturbed.model_copy(update={"world_size": 1}))
    assert (status, phases) == (0, ["validate", "write"])
    assert (undisturbed.output_dir / "results.json").read_bytes() == before


def _refusal(config: EvaluateConfig) -> str:
    log = PhaseLog()
    with pytest.raises(ValueError, match=r".") as caught:
        evaluate_on_ranks(config, log)
    assert "load" not in log.phases, "a refusal must come before a model loads"
    return str(caught.value)


def _refusals(inputs: EvaluationInputs, folder: Path) -> dict[str, str]:
    bad = write_rows(folder / "bad.jsonl", [{"question": "1+2?"}, {"question": "x", "answer": "  "}])
    pq.write_table(pa.table({"question": ["q"], "solution": ["s"]}), folder / "short.parquet")
    refused = {
        "no usable row": _refusal(inputs.config(folder / "1", data=str(bad))),
        "no rows": _refusal(inputs.config(folder / "2", data=str(write_rows(folder / "empty.jsonl", [])))),
        "columns": _refusal(inputs.config(folder / "3", data=str(folder / "short.parquet"))),
        "countdown": _refusal(
            inputs.config(
                folder / "4",
                data="countdown:50:0",
                kind=None,
                countdown={"num_numbers": 2, "largest_number": 3, "largest_target": 10},
            )
        ),
    }
    done = inputs.config(folder / "5", sampling=GREEDY)
    assert evaluate_on_ranks(done, PhaseLog()) == 0
    refused["settings"] = _refusal(done.model_copy(update={"seed": 1}))
    text = inputs.rows.read_bytes()
    inputs.rows.write_bytes(text.replace(b"seven", b"eight"))
    refused["rows"] = _refusal(done)
    inputs.rows.write_bytes(text)
    return refused


def test_what_cannot_be_evaluated_is_refused_by_name_before_a_model_loads(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    (refused,) = run_ranks(_refusals, 1, inputs, tmp_path)
    assert refused["no usable row"].splitlines() == [
        f"no usable row in {tmp_path}/bad.jsonl: all 2 rows were rejected (empty: 1, missing: 1); mend them",
        f"  {tmp_path}/bad.jsonl row 1: missing in column 'answer': absent or null",
        f"  {tmp_path}/bad.jsonl row 2: empty in column 'answer': nothing but white space or invisible characters",
    ]
    assert refused["no rows"] == f"no usable row in {tmp_path}/empty.jsonl: it has no rows"
    assert "short.parquet' lacks the columns answer and has question, solution; " in refused["columns"]
    assert refused["countdown"].startswith("countdown: only 0 of 50 different problems were found")
    assert "run: seed was 0, now 1. Put the values back" in refused["settings"].replace("configuration", "run")
    assert "verdicts.parquet holds rows of another run: content of data (SHA-256) was " in refused["rows"]
