"""Paths and overrides mean what they say, whatever YAML makes of `~`, `#`, `=` and spaces; merge keys work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlt.cli import main
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config, to_yaml

TRAIN = Path("train.yaml")


ODD_WORDS = (
    "my run|run#3|run #3|#3|a=b|="
    "|a==b=|2024|1e-6|yes|on|a: b|a: b: c|[x|{x}|*x|&x|!x|%x|@x|`x`|a, b|- a|? a|it's|null x|"
    """a "b" c|"a" b|x:|>|>-|中文 名|x~/y z|0x10|1_000|2024-01-01|12:30:00|<<|---|..."""
)


@pytest.mark.parametrize("text", [*ODD_WORDS.split("|"), "|"])
def test_a_path_on_the_command_line_is_taken_as_it_is_written(text: str, workplace: Path) -> None:
    config = load_config(TrainConfig, TRAIN, [f"output_dir={text}", f"prompts.teacher_system={text}"])
    assert config.output_dir == Path(text)
    assert config.prompts.teacher_system == text
    (workplace / "again.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, Path("again.yaml"), []) == config


def test_quotes_null_and_surrounding_spaces_are_yamls(workplace: Path) -> None:
    overrides = ["output_dir= 'run #3' ", 'prompts.teacher_system=""', "prompts.student_system=null"]
    config = load_config(TrainConfig, TRAIN, overrides)
    assert (config.output_dir, config.prompts.teacher_system) == (Path("run #3"), "")
    assert config.prompts.student_system is None


def test_other_values_stay_yaml_and_hold_no_comment(workplace: Path) -> None:
    assert load_config(TrainConfig, TRAIN, ["student.layout={tp: 2, sp: true}", " num_steps = 7"]).num_steps == 7
    for override in ("num_steps=7 # steps", "student.layout={tp: 2} # split", "grpo.reference=#"):
        with pytest.raises(ValueError, match=f"command line: {override.partition('=')[0]}: .*comment"):
            load_config(TrainConfig, TRAIN, [override])
    with pytest.raises(ValueError, match=r'num_steps: must be a valid integer, got "7 8"'):
        load_config(TrainConfig, TRAIN, ["num_steps=7 8"])


def test_sections_that_share_an_anchor_are_changed_one_by_one(workplace: Path) -> None:
    text = TRAIN.read_text().replace("teacher: {", "teacher: &m {")
    TRAIN.write_text(text.replace("student: {model: student, dtype: float32}", "student: *m"))
    config = load_config(TrainConfig, TRAIN, ["student.layout.tp=2"])
    assert (config.teacher.layout.tp, config.student.layout.tp) == (1, 2)


def test_the_home_folder_is_meant_by_a_tilde(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    config = load_config(
        TrainConfig, TRAIN, ["output_dir=~/runs/a", "teacher.model=~/teacher", "data.path='~/rows.jsonl'"]
    )
    assert (config.output_dir, config.teacher.model) == (workplace / "runs" / "a", workplace / "teacher")
    assert config.data.path == workplace / "rows.jsonl"
    assert load_config(TrainConfig, TRAIN, ["output_dir=./~/a"]).output_dir == workplace / "~" / "a"
    assert (
        load_config(EvaluateConfig, Path("evaluate.yaml"), ["data=~/questions.jsonl"]).data
        == f"{workplace}/questions.jsonl"
    )
    rows = load_config(PrepareConfig, Path("prepare.yaml"), ["input=['~/rows.jsonl', rows.jsonl]"]).input
    assert rows == (f"{workplace}/rows.jsonl", "rows.jsonl")
    with pytest.raises(ValueError, match=r"output_dir: must be a path: there is no home folder for ~nobody-here"):
        load_config(TrainConfig, TRAIN, ["output_dir=~nobody-here/a"])


def test_a_variable_of_the_shell_is_no_folder_of_its_name(workplace: Path) -> None:
    for path in ("$SCRATCH/runs", "${SCRATCH}/runs", "$HOME"):
        with pytest.raises(ValueError, match=r"output_dir: must be a path: \$\{?\w+\}? is not replaced in a config"):
            load_config(TrainConfig, TRAIN, [f"output_dir={path}"])
    assert load_config(TrainConfig, TRAIN, ["output_dir=./$HOME"]).output_dir == workplace / "$HOME"
    assert load_config(TrainConfig, TRAIN, ["output_dir=price-$5"]).output_dir == Path("price-$5")


@pytest.mark.parametrize("path", ["''", "' '", '"\\u200b"'])
def test_an_empty_path_is_not_the_current_folder(path: str, workplace: Path) -> None:
    for key in ("output_dir", "teacher.model"):
        with pytest.raises(ValueError, match=rf"{key}: must be a path; `\.` is the current folder, got"):
            load_config(TrainConfig, TRAIN, [f"{key}={path}"])
    assert load_config(TrainConfig, TRAIN, ["output_dir=."]).output_dir.absolute() == workplace


@pytest.mark.parametrize("name", ["n" * 256, "a/" + "é" * 128, "a\0b"])
def test_a_name_that_no_file_can_have_is_one_line(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "train.yaml", f"output_dir={name}", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output_dir: must be a path whose names have at most 255 bytes" in line


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("{<<: *m}", ("teacher", "float32", 2)),
        ("{<<: *m, model: student}", ("student", "float32", 2)),
        ("{model: student, <<: *m, layout: {tp: 3}}", ("student", "float32", 3)),
        ("{<<: [{layout: {tp: 4}}, *m]}", ("teacher", "float32", 4)),
        ("*m", ("teacher", "float32", 2)),
    ],
)
def test_merge_keys_lay_a_section_under_another(student: str, expected: tuple[str, str, int], workplace: Path) -> None:
    TRAIN.write_text(
        "output_dir: run\ndata: {path: rows.jsonl}\nteacher: &m {model: teacher, dtype: float32, layout: {tp: 2}}\n"
        f"student: {student}\n"
    )
    student_section = load_config(TrainConfig, TRAIN, []).student
    assert (str(student_section.model), student_section.dtype, student_section.layout.tp) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("student: {<<: teacher}", "expected a mapping"),
        ("student: {<<: *nothing}", "undefined alias"),
        ("student: {<<: *m, <<: *m}", "key '<<' stands twice"),
        ("student: {<<: *m, model: a, model: b}", "key 'model' stands twice"),
        ("student: &s {model: *s}", "an anchor holds itself"),
    ],
)
def test_a_merge_that_means_nothing_is_one_line(
    line: str, says: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TRAIN.write_text(f"output_dir: run\nteacher: &m {{model: teacher}}\ndata: {{path: rows.jsonl}}\n{line}\n")
    assert main(["train", "train.yaml", "--dry-run"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "train.yaml" in error
    assert says in error


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        ({"explanation_close": "<e>"}, "explanation_open and explanation_close are equal, '<e>'"),
        ({"thought_close": "<t>"}, "thought_open and thought_close are equal, '<t>'"),
        ({"solution_open": " <t> "}, "thought_open and solution_open are equal, '<t>'"),
        ({"solution_close": "<s>"}, "solution_open and solution_close are equal, '<s>'"),
        ({"solution_open": "<e>"}, "solution_open and explanation_open are equal, '<e>'"),
        ({"explanation_close": "<t>"}, "thought_open and explanation_close are equal, '<t>'"),
    ],
)
def test_equal_tags_are_refused(
    tags: dict[str, str], named: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"thought_open": "<t>", "solution_open": "<s>", "explanation_open": "<e>", "explanation_close": "</e>"}
    shown = ", ".join(f"{name}: '{text}'" for name, text in (good | tags).items())
    assert main(["train", "train.yaml", f"prompts.custom_tags={{{shown}}}", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"prompts.custom_tags: {named}, and must be different tags" in line


def test_what_opens_and_closes_an_explanation_may_be_the_same_for_both_models(workplace: Path) -> None:
    tags = (
        "{thought_open: <e>, thought_close: </e>, solution_open: <s>, explanation_open: <e>, explanation_close: </e>}"
    )
    assert load_config(TrainConfig, TRAIN, [f"prompts.custom_tags={tags}"]).prompts.custom_tags is not None


@pytest.mark.parametrize("setting", ["grpo.clip_low=0.2", "grpo.clip_high=0.28"])
def test_a_clip_without_a_second_update_is_refused(setting: str, workplace: Path) -> None:
    with pytest.raises(ValueError, match=rf"{setting.partition('=')[0]}=.*: has no effect with updates_per_batch=1"):
        load_config(TrainConfig, TRAIN, [setting]).check()
    load_config(TrainConfig, TRAIN, [setting, "grpo.updates_per_batch=2"]).check()


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff\u2060", "\u00ad", "\u3164", "\u2800 \u115f", "\u0301"])
def test_text_that_shows_nothing_is_empty(text: str, workplace: Path) -> None:
    settings = {"output_dir": "run", "model": {"model": "teacher"}, "data": "rows.jsonl", "kind": "exact"}
    (workplace / "odd.yaml").write_text(json.dumps(settings | {"question_template": text}))  # JSON is YAML
    with pytest.raises(ValueError, match="question_template: must hold visible text"):
        load_config(EvaluateConfig, Path("odd.yaml"), [])
