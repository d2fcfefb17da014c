"""A file of explanations that is cut, changed or of something else is named; numbers over nothing are no `nan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.cli import main
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanation_row import SETTINGS_KEY, VERSION
from megatron_rlt.store.explanations import CompletionStore, read_explanations
from tests.jobs.tiny_completions import completion_of

CONFIG = TrainConfig.model_validate(
    {
        "output_dir": "run",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "data": {"path": "data"},
        "reward": {"lambda_kl": 1.5, "kl_estimator": "k3"},
    }
)


def completions(folder: Path, indices: range) -> Path:
    store = CompletionStore(folder, terms=tuple(LABELS), reward=CONFIG.reward.of_one_explanation, is_writer=True)
    store.write_step(1, [completion_of(index, CONFIG) for index in indices])
    return folder / "step-000001.parquet"


def rewritten(file: Path, *, drop: tuple[str, ...] = (), settings: bytes | None = None, **columns: Any) -> None:
    """The same file without some columns, with others in their place, or with other settings of the reward."""
    table = pq.read_table(file)
    metadata = dict(table.schema.metadata)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values))
    table = table.drop_columns(list(drop))
    if settings is not None:
        metadata[SETTINGS_KEY] = settings
    pq.write_table(table.replace_schema_metadata(metadata), file)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "overwritten":
        file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    elif how == "of something else":
        pq.write_table(pa.table({"id": ["a"]}), file)
    elif how == "without a column":
        rewritten(file, drop=("flags",))
    elif how == "with an unknown flag":
        rewritten(file, flags=[["odd"]] * 4)
    elif how == "with text for numbers":
        rewritten(file, student_solution_logprobs=[["a"]] * 4)
    elif how == "without log-probs":
        rewritten(file, student_solution_logprobs=pa.nulls(4, pa.list_(pa.float32())))
    elif how == "with cut settings":
        rewritten(file, settings=b"{")
    else:
        rewritten(file, settings=json.dumps({"version": VERSION, "reward": {"lambda_kl": "much"}}).encode())


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "empty", "overwritten", "of something else", "without a column", "with an unknown flag"),
        *("with text for numbers", "without log-probs", "with cut settings", "with odd settings"),
    ],
)
def test_reweigh_names_a_damaged_or_changed_file(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = completions(tmp_path, range(4))
    damage(file, how)
    assert main(["reweigh", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line or (how == "without log-probs" and "row 0, explanation 0" in line)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    assert len(list(read_explanations(completions(tmp_path, range(4)), with_tokens=True))) == 4


@pytest.mark.parametrize(
    ("indices", "ranked"),
    [(range(0, 8, 4), False), (range(5, 6), False), (range(4), True)],
    ids=["one explanation a question", "no reward at all", "several"],
)
def test_what_nothing_was_ranked_for_is_not_shown_as_nan(
    indices: range, ranked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reweigh", str(completions(tmp_path, indices)), "reward.lambda_kl=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert ("best explanation changed" in shown) == ranked
    assert ("rank correlation" in shown) == ranked
