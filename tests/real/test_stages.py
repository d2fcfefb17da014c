"""The stages of `make real` hang together, differ where they should, and run to their figures with a tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.section import Section
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer
from tools.real.inputs import ASKED, EXPLAINED, HELD_OUT, MODEL, TRAIN, make_inputs
from tools.real.layouts import MAX_GAP, read_layout_gaps
from tools.real.results import read_results
from tools.real.run import record_of, write_results
from tools.real.sizes import ROWS_PER_SFT_STEP, SIZES, Size
from tools.real.stages import STUDENTS, TEACHERS, on_one_rank, stages
from tools.staged import Stage, run_stages, seconds_ahead

TINY = Size(
    scorer_steps=1,
    warmup_steps=1,
    rl_steps=2,
    questions_per_step=1,
    group_size=2,
    num_explained=8,
    student_steps=1,
    num_asked=6,
    num_samples=2,
)
LONG_TEXTS = ("prompts.max_prompt_tokens=1024",)  # the tiny vocabulary has hardly a whole word
SHORT = {
    "parity": ("rollout.max_completion_tokens=4", "parity.num_rows=2"),
    "sft": ("global_batch_size=2", "max_tokens=2048"),
    "train": ("rollout.max_completion_tokens=6",),
    "collect": ("rollout.max_completion_tokens=6",),
    "score": (),
    "evaluate": ("sampling.max_completion_tokens=6",),
}


def _config(stage: Stage) -> Section:
    return load_config(COMMANDS[stage.command].config_class, stage.config, list(stage.overrides))


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_reads_only_what_stands_before_it(size: str) -> None:
    folder = Path("real")
    there = {folder / file for file in (MODEL, TRAIN, EXPLAINED, ASKED)}
    for stage in stages(folder, SIZES[size], 0):
        values = json.loads(_config(stage).model_dump_json())
        text = json.dumps({key: value for key, value in values.items() if key not in ("output_dir", "output")})
        read = {Path(word) for word in text.replace('"', " ").split() if word.startswith("real/")}
        assert read, stage.name
        selected = {file.with_name("explanations.parquet"): file for file in there}  # all lie beside those selected
        assert {selected.get(file, file) for file in read} <= there, f"{stage.name} reads {read - there}"
        assert stage.result not in there, f"{stage.name} is done before it began"
        there.add(stage.result)


def test_no_stage_falls_back_on_a_path_of_its_configuration() -> None:
    for stage in stages(Path("elsewhere"), SIZES["small"], 0):
        assert "runs/real" not in _config(stage).model_dump_json(), stage.name


def test_on_one_rank_every_layout_fits(tmp_path: Path) -> None:
    chain = stages(tmp_path, SIZES["small"], 0)
    alone = on_one_rank(chain)
    assert {stage.command for stage in chain} - {stage.command for stage in alone} == {"parity"}
    for stage in alone:
        models = _config(stage).models.values()  # type: ignore[attr-defined]
        assert {(model.layout.tp, model.layout.pp, model.layout.cp) for model in models} == {(1, 1, 1)}, stage.name


def test_students_differ_in_their_explanations_alone() -> None:
    chain = [stage for stage in stages(Path("real"), SIZES["small"], 1) if stage.name.startswith("student_")]
    configs = [json.loads(_config(stage).model_dump_json()) for stage in chain]
    assert len({config["data"].pop("path") for config in configs}) == len(STUDENTS) == 3
    assert len({config.pop("output_dir") for config in configs}) == 3
    assert all(config == configs[0] for config in configs)


def test_sizes_keep_their_promise() -> None:
    """45 and 150 minutes on two quiet cores; a student sees each of its rows once."""
    for name, minutes in (("small", 45), ("full", 150)):
        assert seconds_ahead(stages(Path("nowhere"), SIZES[name], 0)) <= 60 * minutes
        assert SIZES[name].num_explained == ROWS_PER_SFT_STEP * SIZES[name].student_steps


def test_inputs_are_made_once_and_held_out_questions_are_new(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "config.json").touch()  # it is there: nothing is fetched
    make_inputs(tmp_path, TINY, seed=0)
    rows = {file: _questions(tmp_path / file) for file in (TRAIN, HELD_OUT, EXPLAINED, ASKED)}
    assert (len(rows[EXPLAINED]), len(rows[ASKED])) == (8, 6)
    assert rows[TRAIN][:8] == rows[EXPLAINED]
    assert rows[HELD_OUT][:6] == rows[ASKED]
    assert not set(rows[TRAIN]) & set(rows[HELD_OUT])
    (tmp_path / TRAIN).write_text("kept")
    make_inputs(tmp_path, TINY, seed=0)
    assert (tmp_path / TRAIN).read_text() == "kept"


def _questions(file: Path) -> list[str]:
    return [json.loads(line)["question"] for line in file.read_text().splitlines()]


def test_a_stage_that_failed_after_its_result_was_written_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "parity.json"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncp {__file__} {result}\ntest -e {tmp_path}/mended\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    stage = Stage("parity", "", "parity", tmp_path / "parity.yaml", result, (), 1)
    console = Console(file=StringIO())
    for _ in range(2):  # the second finds what the first set aside
        assert run_stages(tmp_path, [stage], console) == 1
        assert not result.exists()
    (tmp_path / "mended").touch()
    assert run_stages(tmp_path, [stage], console) == 0
    assert result.exists()


@pytest.mark.slow
@pytest.mark.full
def test_the_whole_chain_runs_with_a_tiny_model_and_a_second_start_does_nothing(
    tmp_path: Path, preloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(preloaded))  # with which the stages start their commands
    tiny_tokenizer(tmp_path / MODEL)
    tiny_hf_model(  # heads as SmolLM2's
        tmp_path / MODEL,
        "llama",
        tied=True,
        vocab_size=400,
        hidden_size=144,
        num_heads=9,
        num_kv_heads=3,
        max_positions=4096,
    )
    make_inputs(tmp_path, TINY, seed=0)
    chain = [replace(one, overrides=(*one.overrides, *LONG_TEXTS, *SHORT[one.command])) for one in _chain(tmp_path)]
    assert run_stages(tmp_path, chain, Console(file=StringIO())) == 0
    gaps = read_layout_gaps(tmp_path)
    assert {gap.layout for gap in gaps} == {"dp 2", "pp 2", "cp 2", "tp 3", "dp 3"}
    assert all(gap.maximum < MAX_GAP for gap in gaps)

    printed = StringIO()
    write_results(tmp_path, record_of("small", 0, 2), Console(file=printed, width=160))
    results = read_results(tmp_path)
    assert results.rl is not None
    assert len(results.rl.styles) == TINY.rl_steps
    assert sum(found.num_explanations for found in results.by_style.values()) == 4  # 2 steps x 1 question x 2
    assert [found.num_questions for found in results.held_out.values()] == [6] * len(TEACHERS)
    assert [len(student.loss) for student in results.students.values()] == [1, 1, 1]
    assert len(results.examples) == 5
    written = json.loads((tmp_path / "real.json").read_text())
    assert written["results"]["students"]["rlt"]["sampled"]["mean"] >= 0
    assert str(tmp_path) not in json.dumps(written["stages"])
    assert "the RL teacher" in printed.getvalue().split("Held-out explanations")[1]
    assert results.examples[0].question in (tmp_path / "examples.md").read_text()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")

    seconds, again = (tmp_path / "stages.json").read_bytes(), StringIO()
    assert run_stages(tmp_path, chain, Console(file=again)) == 0
    assert again.getvalue().count("done before") == len(chain)
    assert (tmp_path / "stages.json").read_bytes() == seconds


def _chain(folder: Path) -> tuple[Stage, ...]:
    return stages(folder, TINY, 0)
