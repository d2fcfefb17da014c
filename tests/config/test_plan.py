"""Derived numbers, by hand; `test_plan_against_models.py` compares with models that are really built."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.plan import max_rank_parameters, most_packs, num_parameters
from megatron_rlt.config.training import OptimizerConfig, num_warmup_updates


def test_the_numbers_of_an_rl_run(workplace: Path) -> None:
    overrides = [
        "world_size=12",
        "teacher.layout={tp: 2, pp: 2, sp: true}",  # 12 / 4 = 3 replicas
        "student.layout.tp=6",  # 12 / 6 = 2 replicas
        "grpo={questions_per_step: 8, group_size: 4, updates_per_batch: 2, micro_batch_size: 4}",
        "optimizer.warmup_fraction=0.1",
    ]
    config = load_config(TrainConfig, Path("train.yaml"), overrides)
    shapes = {name: Architecture.from_folder(workplace / name) for name in ("teacher", "student")}

    plan = config.plan(shapes)

    assert dict(plan.numbers) == {
        "groups per step": 8,
        "completions per step": 32,
        "completions per optimizer step": 16,
        "teacher sequences per data-parallel rank and step, at most": 11,  # 32 / 3
        "student sequences per data-parallel rank and step, at most": 16,
        "micro-batches per rank and step, at most": 4,  # 16 / 3 -> 6 per rank, in packs of 4: 2, for 2 updates
        "optimizer steps": 20,
        "warm-up steps": 2,
        "teacher tokens per step, at most": 16_000,  # 32 x (200 + 300)
    }
    assert [model.layout for model in plan.models] == ["tp 2 x pp 2 x dp 3, sp", "tp 6 x pp 1 x dp 2"]


def test_parameters_and_bytes_of_the_fullest_rank(workplace: Path) -> None:
    teacher = Architecture.from_folder(workplace / "teacher")
    # A layer: q and o 64 x 64, k and v 64 x 32, biases 64 + 2 x 32, feed-forward 3 x 64 x 96; two norms of 64.
    split, whole = 2 * 4096 + 2 * 2048 + 128 + 18_432, 128
    assert num_parameters(teacher) == 4 * (split + whole) + 2 * 101 * 64 + 64
    # tp 2: 101 entries are padded to 102, 51 a rank. pp 2: two layers, and the last stage has output layer and norm.
    assert max_rank_parameters(teacher, tp=2, pp=1) == 4 * (split // 2 + whole) + 2 * 51 * 64 + 64
    last_stage = 2 * (split // 2 + whole) + 51 * 64 + 64
    assert max_rank_parameters(teacher, tp=2, pp=2) == last_stage

    overrides = ["world_size=8", "teacher={layout: {tp: 2, pp: 2}, dtype: bfloat16}"]
    config = load_config(TrainConfig, Path("train.yaml"), [*overrides, "teacher.model=teacher"])
    plan = config.plan({"teacher": teacher, "student": Architecture.from_folder(workplace / "student")})
    trained, frozen = plan.models
    assert trained.weight_bytes == 2 * 2 * last_stage  # bf16, and as much for the reference
    assert trained.gradient_bytes == 4 * last_stage
    assert trained.optimizer_bytes == 12 * (last_stage // 2)  # fp32 copy and two moments, over two replicas
    assert trained.total_bytes == trained.weight_bytes + trained.gradient_bytes + trained.optimizer_bytes
    assert (frozen.weight_bytes, frozen.gradient_bytes, frozen.optimizer_bytes) == (4 * frozen.num_parameters, 0, 0)


def test_context_parallel_ranks_share_sequences_and_the_optimizer_but_not_weights(workplace: Path) -> None:
    shapes = {name: Architecture.from_folder(workplace / name) for name in ("teacher", "student")}
    plans = [
        load_config(TrainConfig, Path("train.yaml"), ["world_size=4", f"teacher.layout={layout}"]).plan(shapes)
        for layout in ("{tp: 1}", "{cp: 2}")
    ]
    whole, cut = (plan.models[0] for plan in plans)
    assert (whole.layout, cut.layout) == ("tp 1 x pp 1 x dp 4", "tp 1 x pp 1 x cp 2 x dp 2")
    assert (cut.weight_bytes, cut.optimizer_bytes) == (whole.weight_bytes, whole.optimizer_bytes)
    name = "teacher sequences per data-parallel rank and step, at most"
    assert [dict(plan.numbers)[name] for plan in plans] == [8, 16]


def test_without_beta_no_reference_is_counted(workplace: Path) -> None:
    shapes = {name: Architecture.from_folder(workplace / name) for name in ("teacher", "student")}
    with_reference = load_config(TrainConfig, Path("train.yaml"), []).plan(shapes).models[0]
    without = load_config(TrainConfig, Path("train.yaml"), ["grpo.reference=null"]).plan(shapes).models[0]
    assert with_reference.weight_bytes == 2 * without.weight_bytes == 8 * without.num_parameters


def _write_rows(count: int) -> None:
    Path("rows.jsonl").write_text("{}\n" * count)


def test_the_numbers_of_a_supervised_run(workplace: Path) -> None:
    overrides = ["world_size=3", "global_batch_size=16", "micro_batch_size=4", "num_epochs=2.5"]
    _write_rows(100)
    config = load_config(SftConfig, Path("sft.yaml"), overrides)
    shapes = {"model": Architecture.from_folder(workplace / "teacher")}
    numbers = dict(config.plan(shapes).numbers)
    assert numbers == {
        "rows per optimizer step": 16,
        "rows per data-parallel rank and step, at most": 6,
        "micro-batches per rank and step, at most": 2,
        "tokens per step, at most": 16 * 512,
        "optimizer steps": 16,  # 2.5 x 100 / 16 = 15.6
        "warm-up steps": 1,  # 5 % of 16 = 0.8
    }
    uncounted = load_config(SftConfig, Path("sft.yaml"), [*overrides, "data.path=empty_folder"])
    assert "optimizer steps" not in dict(uncounted.plan(shapes).numbers)


def test_the_numbers_of_scoring(workplace: Path) -> None:
    config = load_config(ScoreConfig, Path("score.yaml"), ["world_size=6", "student.layout.tp=3", "rows_per_part=100"])
    shapes = {name: Architecture.from_folder(workplace / name) for name in ("teacher", "student")}
    assert dict(config.plan(shapes).numbers) == {
        "rows per saved part": 100,
        "teacher sequences per data-parallel rank and part, at most": 17,  # 100 / 6
        "student sequences per data-parallel rank and part, at most": 50,
    }


def test_the_numbers_of_a_collection(workplace: Path) -> None:
    overrides = ["world_size=6", "student.layout.tp=3", "questions_per_part=10"]
    _write_rows(25)
    config = load_config(CollectConfig, Path("collect.yaml"), overrides)
    uncounted = load_config(CollectConfig, Path("collect.yaml"), [*overrides, "data=empty_folder"])
    shapes = {name: Architecture.from_folder(workplace / name) for name in ("teacher", "student")}
    part = {
        "explanations of each question": 4,
        "explanations in a saved part": 40,
        "sampled tokens per part, at most": 12_000,  # 40 x 300
        "teacher sequences per data-parallel rank and part, at most": 7,  # 40 / 6
        "student sequences per data-parallel rank and part, at most": 20,
    }
    assert dict(uncounted.plan(shapes).numbers) == part
    whole = {"questions, at most": 25, "explanations, at most": 100, "saved parts": 3}
    assert dict(config.plan(shapes).numbers) == part | whole
    _write_rows(2)
    alone = load_config(CollectConfig, Path("collect.yaml"), ["student=null"])
    assert [model.name for model in alone.plan(shapes).models] == ["teacher"]
    assert dict(alone.plan(shapes).numbers)["explanations in a saved part"] == 8


def test_the_numbers_of_an_evaluation(workplace: Path) -> None:
    overrides = ["world_size=3", "sampling.num_samples=4", "questions_per_part=2"]
    config = load_config(EvaluateConfig, Path("evaluate.yaml"), overrides)
    shapes = {"model": Architecture.from_folder(workplace / "teacher")}
    part = {
        "answers to each question": 4,
        "answers in a saved part": 8,
        "answers per data-parallel rank and part, at most": 3,  # 8 / 3
        "sampled tokens per part, at most": 2400,  # 8 x 300
    }
    uncounted = load_config(EvaluateConfig, Path("evaluate.yaml"), [*overrides, "data=rows.parquet"])
    assert dict(uncounted.plan(shapes).numbers) == part
    known = dict(config.plan(shapes).numbers)  # of three questions
    assert known == part | {"questions, at most": 3, "answers, at most": 12}
    generated = load_config(EvaluateConfig, Path("evaluate.yaml"), [*overrides, "data=countdown:1:0", "kind=null"])
    one = dict(generated.plan(shapes).numbers)
    assert one["sampled tokens per part, at most"] == 1200


@pytest.mark.parametrize(
    ("fraction", "updates", "expected"), [(0.0, 10, 0), (0.05, 100, 5), (0.99, 10, 9), (0.5, 1, 0)]
)
def test_at_least_one_step_runs_at_the_peak_rate(fraction: float, updates: int, expected: int) -> None:
    assert num_warmup_updates(OptimizerConfig(warmup_fraction=fraction), updates) == expected


@pytest.mark.parametrize(
    ("max_tokens", "max_sequences", "most"),
    [
        (100, None, 5),  # two sequences of 50 fill a pack
        (149, None, 5),
        (150, None, 4),
        (10, None, 10),  # a longer sequence has a pack of its own
        (1000, None, 1),
        (1000, 3, 4),
        (100, 3, 5),
    ],
)
def test_packs_at_most_for_ten_sequences_of_up_to_fifty_tokens(
    max_tokens: int, max_sequences: int | None, most: int
) -> None:
    assert most_packs(10, longest=50, max_tokens=max_tokens, max_sequences=max_sequences) == most
