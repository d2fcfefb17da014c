"""What a configuration file and overrides become when nothing is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.keys import closest_key, keys_of
from megatron_rlt.config.loading import load_config, load_overrides, to_yaml, with_changes
from megatron_rlt.config.reward import PenaltyConfig, RewardConfig


def test_the_last_override_wins_over_earlier_ones_and_the_file(workplace: Path) -> None:
    overrides = ["num_steps=3", "student.layout.tp=2", "num_steps=4", "prompts.teacher_system='a: b'"]

    config = load_config(TrainConfig, Path("train.yaml"), overrides)

    assert (config.num_steps, config.student.layout.tp, config.prompts.teacher_system) == (4, 2, "a: b")
    assert config.prompts.max_prompt_tokens == 200  # from the file, beside an override of its section


def test_numbers_without_a_dot_are_numbers_and_whole_numbers_are_floats(workplace: Path) -> None:
    config = load_config(
        TrainConfig, Path("train.yaml"), ["optimizer.lr=5e-4", "temperature=1", "optimizer.epsilon=1E-8"]
    )
    assert (config.optimizer.lr, config.temperature, config.optimizer.epsilon) == (0.0005, 1.0, 1e-8)


def test_naming_one_key_of_a_preset_section_keeps_its_other_presets(workplace: Path) -> None:
    preset = load_config(SftConfig, Path("sft.yaml"), []).optimizer
    changed = load_config(SftConfig, Path("sft.yaml"), ["optimizer.lr=2e-5"]).optimizer
    assert changed == preset.model_copy(update={"lr": 2e-5})
    assert (changed.schedule, changed.warmup_fraction, changed.beta2) == ("cosine", 0.05, 0.95)


def test_the_resolved_yaml_states_every_key_and_reads_back_to_an_equal_configuration(workplace: Path) -> None:
    config = load_config(TrainConfig, Path("train.yaml"), ["grpo.reference=null", "optimizer.lr=1e-6"])
    Path("resolved.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, Path("resolved.yaml"), []) == config
    assert all(
        key.dotted.rpartition(".")[2] in to_yaml(config) for key in keys_of(TrainConfig) if not _in_null(key.dotted)
    )


def _in_null(dotted: str) -> bool:
    return dotted.startswith(("prompts.custom_tags.", "students.", "grpo.reference.", "teacher.fp8.", "student.fp8."))


def test_paths_are_relative_to_the_working_directory_not_to_the_file(workplace: Path) -> None:
    folder = workplace / "configurations"
    folder.mkdir()
    (workplace / "prepare.yaml").rename(folder / "prepare.yaml")
    assert load_config(PrepareConfig, folder / "prepare.yaml", []).output_dir == Path("shards")


def test_keys_carry_defaults_of_the_command_and_a_sentence_each() -> None:
    sft = {key.dotted: key for key in keys_of(SftConfig)}
    train = {key.dotted: key for key in keys_of(TrainConfig)}
    assert (sft["optimizer.schedule"].default, train["optimizer.schedule"].default) == ("cosine", "constant")
    assert [key for key in [*sft.values(), *train.values()] if not key.sentence.endswith(".")] == []
    required = {name for name, key in train.items() if key.required and key.section is None and not _in_null(name)}
    assert required == {"output_dir", "teacher.model", "student.model", "data.path"}


def test_a_mistyped_key_is_looked_for_by_its_last_name_then_by_spelling() -> None:
    keys = keys_of(TrainConfig)
    assert closest_key("lr", keys) == "optimizer.lr"
    assert closest_key("grpo.clip_hi", keys) == "grpo.clip_high"
    assert closest_key("optimiser.lr", keys) == "optimizer.lr"
    assert closest_key("zzz", keys) is None


def test_changes_win_over_what_was_stored_and_what_is_not_named_stays() -> None:
    """Even where a change names the default: it is not the stored value."""
    stored = RewardConfig(alpha=0.5, lambda_kl=1.0, penalties=PenaltyConfig(empty=-2.0, truncated=-0.5))
    named = load_overrides(
        ReweighConfig, {"source": "scores.parquet"}, ["reward.lambda_kl=3.0", "reward.penalties.empty=0.0"]
    )
    changed = with_changes(stored, named.reward)
    assert changed == RewardConfig(alpha=0.5, lambda_kl=3.0, penalties=PenaltyConfig(empty=0.0, truncated=-0.5))


def test_a_student_that_is_the_teacher_itself_gets_the_teachers_resolved_section(workplace: Path) -> None:
    overrides = ["student=self", "teacher.layout={tp: 2, sp: true}", "teacher.dtype=bfloat16"]
    config = load_config(TrainConfig, workplace / "train.yaml", overrides)
    assert config.student == config.teacher
    assert (config.student.model, config.student.layout.tp, config.student.dtype) == (Path("teacher"), 2, "bfloat16")
    (workplace / "again.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, workplace / "again.yaml", []) == config


def test_no_other_word_is_a_student(workplace: Path) -> None:
    with pytest.raises(ValueError, match=r'student: must be a section with keys model, .*, got "teacher"'):
        load_config(TrainConfig, workplace / "train.yaml", ["student=teacher"])
