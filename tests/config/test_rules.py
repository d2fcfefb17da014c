"""Rules that hold at their boundary, and model shapes whose limits need arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.rlvr import RlvrConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.paths import count_rows


def test_valid_configurations_break_no_rule(workplace: Path) -> None:
    load_config(TrainConfig, Path("train.yaml"), []).check()
    load_config(SftConfig, Path("sft.yaml"), []).check()
    load_config(ScoreConfig, Path("score.yaml"), []).check()
    load_config(EvaluateConfig, Path("evaluate.yaml"), []).check()
    load_config(PrepareConfig, Path("prepare.yaml"), []).check()


@pytest.mark.parametrize(
    "overrides",
    [
        ["world_size=2", "teacher.layout.tp=2", "teacher.layout.sp=true"],
        ["world_size=12", "teacher.layout={tp: 2, pp: 2}", "student.layout.tp=6"],
        ["world_size=4", "grpo.questions_per_step=1", "grpo.group_size=4"],  # one completion a rank
        ["rollout.max_completion_tokens=312"],  # 200 + 312 = 512 positions
        ["grpo.updates_per_batch=8"],
        ["grpo.clip_low=0.99", "grpo.updates_per_batch=2"],
        ["optimizer={schedule: cosine, lr: 1e-5, min_lr: 1e-5}"],
        ["grpo.reference=null"],
        ["output_dir=new/folder"],
    ],
)
def test_rules_hold_at_their_boundary(workplace: Path, overrides: list[str]) -> None:
    load_config(TrainConfig, Path("train.yaml"), overrides).check()


def test_tokenizers_with_the_same_ids_in_another_file_layout_are_the_same(workplace: Path) -> None:
    file = workplace / "student" / "tokenizer.json"
    file.write_text(file.read_text().replace(", ", ",\n "))
    load_config(TrainConfig, Path("train.yaml"), []).check()


def test_position_limits_count_the_scaling_that_max_positions_leaves_out(workplace: Path) -> None:
    plain = Architecture.from_folder(workplace / "teacher")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert position_limit(plain) == 512
    assert position_limit(replace(plain, rope_scaling=yarn)) == 2048
    assert position_limit(replace(plain, rope_scaling=yarn, max_positions=2048)) == 2048
    assert position_limit(replace(plain, rope_scaling={"rope_type": "linear", "factor": 2.0})) == 1024
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    assert position_limit(replace(plain, rope_scaling=llama3)) == 512


def test_rows_are_counted_in_a_file_and_in_an_index(workplace: Path) -> None:
    assert count_rows(workplace / "rows.jsonl") == 2  # and one blank line
    assert count_rows(workplace / "empty_folder") is None
    meta = workplace / "empty_folder" / ".nv-meta"
    meta.mkdir()
    (meta / ".info.json").write_text('{"shard_counts": {"a.tar": 5, "b.tar": 2}}')
    assert count_rows(workplace / "empty_folder") == 7


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=countdown:5:0", "kind=null", "countdown.num_numbers=3"],
        ["data=countdown:5:0", "kind=countdown"],
        ["sampling.greedy=true"],
        ["sampling.num_samples=64"],
        ["sampling.max_completion_tokens=312"],  # 200 + 312 = 512 positions
        ["kind=choice", "columns.answer=solution", "question_template='{question} Only the letter.'"],
        ["world_size=4", "model.layout={tp: 2, sp: true}"],
    ],
)
def test_what_an_evaluation_may_ask(workplace: Path, overrides: list[str]) -> None:
    load_config(EvaluateConfig, Path("evaluate.yaml"), overrides).check()


def test_a_punished_end_is_part_of_the_budget() -> None:
    def faults(*overrides: str) -> list[str]:
        file = Path(__file__).parents[2] / "configs" / "demo" / "rlvr_2cpu_tp2sp.yaml"  # a budget of 61 tokens
        return load_config(RlvrConfig, file, list(overrides)).faults({})

    assert faults() == faults("verifier.overlong={buffer_tokens: 61, weight: 2}") == []
    assert faults("verifier.overlong.buffer_tokens=62") == [
        "verifier.overlong.buffer_tokens=62: must not exceed rollout.max_completion_tokens=61; nearest valid: 61"
    ]
    with pytest.raises(ValueError, match=r"verifier\.overlong\.buffer_tokens: required key is missing"):
        faults("verifier.overlong.weight=2")
