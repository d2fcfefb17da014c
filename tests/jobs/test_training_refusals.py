"""What both kinds of `train` refuse of their data, in lines that name file, row and value, and what they leave free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.commands.rlvr import RlvrConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.rlvr.run import run_rlvr
from megatron_rlt.jobs.train.run import run_train
from megatron_rlt.launch.watchdog import Heartbeat
from tests.distributed.tiny_runs import RL_CONFIG, ROOT, TinyInputs, tiny_inputs
from tests.jobs.tiny_scores import write_rows
from tests.ranks import run_ranks

RLVR_CONFIG = ROOT / "configs" / "demo" / "rlvr_2cpu_tp2sp.yaml"
GOOD = {"id": "good", "question": "What is 1/2 + 1/4?", "solution": "\\frac{3}{4}"}
VAGUE = {"question": "What is it?", "solution": "it depends"}
LONG = {"id": "long", "question": "5 +5 *5 " * 40, "solution": "7"}


@dataclass(frozen=True)
class Case:
    """A data file, the settings beside it, and what is said of it; FILE and RUN stand for the paths."""

    rows: list[Any]
    says: list[str]  # line by line
    settings: tuple[str, ...] = ()


CASES = {
    "empty": Case([], ["no usable row in FILE: it has no rows"]),
    "column": Case(
        [{"id": "a", "question": "One?"}],
        [
            "no usable row in FILE: all 1 rows were rejected (missing: 1): mend them or set `columns`",
            "  FILE row 1: missing in column 'solution': absent or null",
        ],
    ),
    "long": Case(
        [GOOD, LONG],
        [
            "FILE: problem long: its ",
            "tokens, more than prompts.max_prompt_tokens = 64; drop the row or raise the limit",
        ],
    ),
}
VAGUE_CASE = Case(
    [GOOD, VAGUE],
    [
        "FILE: problem row-2: math-verify cannot use its solution 'it depends' (unreadable",
        "all of it must be mathematics",
        "; correct the row or drop it",
    ],
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("refused"), num_rows=4)


def _run(name: str, settings: list[str], inputs: TinyInputs, heartbeat: Heartbeat) -> int:
    if name.startswith("rlvr"):
        return run_rlvr(load_config(RlvrConfig, RLVR_CONFIG, [*settings, "verifier.kind=math"]), heartbeat)
    return run_train(load_config(TrainConfig, RL_CONFIG, [*settings, f"teacher.model={inputs.model}"]), heartbeat)


def _refusals(inputs: TinyInputs, files: dict[str, Path], folder: Path) -> dict[str, str]:
    """What the run on each file says; all share one output folder, as when a user mends the data and starts again."""
    said = {}
    shared = [f"student.model={inputs.model}", f"output_dir={folder}", "prompts.max_prompt_tokens=64", "world_size=2"]
    heartbeat = Heartbeat(rank=0, folder=folder.with_name("beats"), timeout_seconds=600)
    for name, file in files.items():
        with pytest.raises(ValueError, match=str(file)) as refusal:
            _run(name, [*shared, f"data.path={file}"], inputs, heartbeat)
        said[name] = str(refusal.value)
    return said


def test_data_that_cannot_be_used_is_refused_by_file_row_and_value_and_the_folder_stays_free(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    cases = {f"{job} {name}": case for job in ("rlt", "rlvr") for name, case in CASES.items()}
    cases["rlvr vague"] = VAGUE_CASE
    files = {name: write_rows(tmp_path / f"{name}.jsonl", case.rows) for name, case in cases.items()}
    (said,) = run_ranks(_refusals, 1, inputs, files, tmp_path / "run")
    for name, case in cases.items():
        for piece in case.says:
            assert piece.replace("FILE", str(files[name])) in said[name], name
        assert len(said[name].splitlines()) == (2 if name.endswith("column") else 1)
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()
