"""A training run is resumed with the models, tokenizers and templates that it began with, by content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rlt.config.models import ModelConfig
from megatron_rlt.jobs.run.fingerprints import training_contents
from megatron_rlt.store.run_folder import check_contents
from megatron_rlt.types import tell_nobody
from tests.distributed.tiny_runs import SMALL_RL, SMALL_SFT, TinyInputs, sft_here, tiny_inputs, train_here
from tests.jobs.tiny_steps import SINGLE_RANK
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("contents"), num_rows=4)


def scale_weights(folder: Path) -> None:
    weights = {name: 1.5 * value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"version": "1.1"}))


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def change_stop_ids(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')


CHANGES: dict[str, tuple[str, Callable[[Path], None], str | None]] = {
    "student's weights": ("student", scale_weights, "content of student"),
    "student's tokenizer": ("student", change_tokenizer, "content of student"),
    "student's template": ("student", change_template, "content of student"),
    "student's stop ids": ("student", change_stop_ids, "content of student"),
    "teacher's tokenizer": ("teacher", change_tokenizer, "tokenizer and configuration of teacher"),
    "teacher's template": ("teacher", change_template, "tokenizer and configuration of teacher"),
    "teacher's weights, which checkpoints replace": ("teacher", scale_weights, None),
}


def contents_after_changes(model: Path, folder: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Contents before, and after each change alone."""

    def contents(name: str) -> dict[str, str]:
        places = {which: ModelConfig(model=folder / name / which) for which in ("teacher", "student")}
        return training_contents(places, "teacher", tell_nobody)

    after = {}
    for name in ("before", *CHANGES):
        for which in ("teacher", "student"):
            shutil.copytree(model, folder / name / which)
        if name in CHANGES:
            which, change, _ = CHANGES[name]
            change(folder / name / which)
        after[name] = contents(name)
    return after.pop("before"), after


def test_only_what_a_resumed_run_reads_counts(inputs: TinyInputs, tmp_path: Path) -> None:
    ((before, after),) = run_ranks(contents_after_changes, 1, inputs.model, tmp_path)
    assert set(before) == {"content of student", "tokenizer and configuration of teacher"}
    for name, (_, _, expected) in CHANGES.items():
        assert [key for key in before if after[name][key] != before[key]] == ([] if expected is None else [expected])


def test_other_contents_are_refused_by_name_and_a_folder_without_any_passes(tmp_path: Path) -> None:
    held = {"content of student": "aa", "content of students.extra.small": "bb"}
    check_contents(tmp_path, held)
    (tmp_path / "run.json").write_text(json.dumps({"command": "train", "starts": []}))  # of an earlier version
    check_contents(tmp_path, held)
    (tmp_path / "run.json").write_text(json.dumps({"command": "train", "contents": held, "starts": []}))
    check_contents(tmp_path, held)
    with pytest.raises(ValueError, match=r"content of students.extra.small was 'bb', now 'cc'. Put the files back"):
        check_contents(tmp_path, held | {"content of students.extra.small": "cc"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: not valid JSON .*choose another output_dir"):
        check_contents(tmp_path, held)


def resume_after_changes(inputs: TinyInputs, folder: Path) -> list[str]:
    said = []
    student = shutil.copytree(inputs.model, folder / "student")
    settings = [*SMALL_RL, *inputs.for_train, *SINGLE_RANK, f"student.model={student}", "num_steps=1"]
    train_here(folder / "train", settings)
    scale_weights(student)
    trained = shutil.copytree(inputs.model, folder / "trained")
    sft = [*SMALL_SFT, f"model.model={trained}", f"data.path={inputs.shards}", "num_steps=1", "world_size=1"]
    sft_here(folder / "sft", sft)
    change_template(trained)
    for start, name, given in ((train_here, "train", settings), (sft_here, "sft", sft)):
        try:
            start(folder / name, [*given, "num_steps=2"])
        except ValueError as error:
            said.append(str(error))
    return said


def test_resuming_with_a_replaced_student_or_template_is_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    ((train, sft),) = run_ranks(resume_after_changes, 1, inputs, tmp_path)
    assert "content of student was" in train
    assert "tokenizer and configuration of model was" in sft


def finished_again(inputs: TinyInputs, folder: Path) -> tuple[float, float, str]:
    """When the export was written after each of two starts, and what the second said."""
    settings = [*SMALL_SFT, *inputs.for_sft, "num_steps=1", "world_size=1"]
    sft_here(folder, settings)
    export = folder / "hf" / "model.safetensors"
    before = export.stat().st_mtime
    with redirect_stdout(StringIO()) as said:
        sft_here(folder, settings)
    return before, export.stat().st_mtime, said.getvalue()


def test_a_finished_run_that_is_started_again_says_so(inputs: TinyInputs, tmp_path: Path) -> None:
    ((before, after, said),) = run_ranks(finished_again, 1, inputs, tmp_path / "run")
    assert before == after
    assert f"Nothing to do: {tmp_path / 'run'} holds 1 steps already, and num_steps is 1" in said
