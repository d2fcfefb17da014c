"""The recorded runs: tiny inputs, and a list of real command lines in groups whose members need nothing of each other.

All that a new version of the code may call differently (commands, configuration files and keys, places of outputs)
stands in this file. A run keeps its name forever: by it two records are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tools.demo.make_assets import make_assets, save_model
from tools.demo.stages import NUM_ROWS, experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
COMMANDS = {  # this file's word: command and configuration; `score.yaml` is written by `make_inputs`
    "prepare": ("prepare", CONFIGS / "prepare.yaml"),
    "sft_student": ("sft", CONFIGS / "scorer_2cpu_dp2.yaml"),
    "sft_teacher": ("sft", CONFIGS / "warmup_2cpu_dp2.yaml"),
    "train": ("train", CONFIGS / "rlt_2cpu_tp2sp_dp2.yaml"),
    "rlvr": ("rlvr", CONFIGS / "rlvr_2cpu_tp2sp.yaml"),
    "parity": ("parity", CONFIGS / "rlt_2cpu_tp2sp_dp2.yaml"),
    "collect": ("collect", CONFIGS / "collect_2cpu_dp2.yaml"),
    "evaluate": ("evaluate", CONFIGS / "evaluate_2cpu_dp2.yaml"),
    "score": ("score", Path("score.yaml")),
}
ALONE = ("world_size=1", "teacher.layout={tp: 1, sp: false}")
WHOLE = "{tp: 2, sp: true}"
QUIET = "metrics.tensorboard=false"
SMALL_SFT = (QUIET, "global_batch_size=16", "micro_batch_size=8", "data.shuffle_buffer_size=16")
SMALL_RL = (
    *(QUIET, "num_steps=3", "grpo.questions_per_step=4", "grpo.group_size=4", "grpo.micro_batch_size=4"),
    *("optimizer.lr=2e-3", "optimizer.warmup_fraction=0", "data.shuffle_buffer_size=16", "checkpoint.interval_steps=2"),
)
OTHER_REWARD = ("reward.lambda_kl=1", "reward.alpha=0.5", "reward.kl_estimator=k3", "reward.penalties.truncated=-0.5")
Ways = Mapping[str, tuple[str, ...]]  # overrides by a run's name
TRAIN: Ways = {
    "train_demo_layout": ("num_steps=4",),
    "train_pp2": ("teacher.layout={pp: 2}",),
    "train_cp2": ("teacher.layout={cp: 2}", f"student.layout={WHOLE}"),
    "train_kl_full": ("reward.kl_estimator=full", f"student.layout={WHOLE}"),
    "train_host": (
        *(f"student.layout={WHOLE}", "student.offload=true", "grpo.reference.beta=0.1"),
        *("grpo.reference.sync_steps=1", "grpo.reference.offload=true"),
    ),
    "train_bfloat16": ("teacher.dtype=bfloat16", "student.dtype=bfloat16", "teacher.recompute=full"),
    "train_self": (*ALONE, "student=self"),
    "train_gain": (*ALONE, "reward.solution_unit=gain"),
    "train_k3_probability": (
        *(*ALONE, "reward.kl_estimator=k3", "reward.solution_unit=probability"),
        *("grpo.aggregation=constant", "grpo.normalize_std=false"),
    ),
    "train_leaks": (
        *(*ALONE, "reward.leaks={solution_overlap: -0.5, repetition: -1.0, epistemic_per_100_words: 0.01}"),
        "reward.penalties={missing_end_tag: -5.0, contains_tags: -1.0, truncated: -0.5}",
    ),
    "train_two_updates": (
        *(*ALONE, "grpo.updates_per_batch=2", "grpo.reference.beta=0.1", "grpo.reference.sync_steps=2"),
        *("grpo.clip_low=0.2", "grpo.clip_high=0.28", "grpo.aggregation=token_mean", "grpo.mask_truncated=true"),
    ),
    "train_mismatch": (
        *(*ALONE, "mismatch.token_weight_cap=2", "mismatch.sequence_ratio_min=0.97", "rollout.top_p=0.95"),
    ),
}
RLVR = "verifier={kind: exact, max_sampling_rounds: 2, well_formed_bonus: 0.1, overlong: {buffer_tokens: 20}}"
COLLECT: Ways = {  # the controls score what the first has sampled
    "scored": (),
    **{f"control_{name}": (f"control={name}",) for name in ("shuffled", "other_question", "no_explanation")},
}
SCORE: Ways = {
    "score_own": ("world_size=2",),
    "score_other_question": ("control=other_question",),
    "score_shuffled": ("control=shuffled",),
    "score_kl_full_without_baseline": ("baseline=false", "reward.kl_estimator=full"),
}
EVALUATE: Ways = {
    "evaluate_greedy": (),
    "evaluate_sampled": ("world_size=1", "sampling.greedy=false", "sampling.num_samples=3"),
}
DEMO: Ways = {  # half of the demo's steps
    "shards": (),
    "scorer": ("num_steps=300", "checkpoint.interval_steps=150"),
    "warmup": ("num_steps=200", "checkpoint.interval_steps=100"),
    "rlt": ("num_steps=40",),
}
PARITY: Ways = {"parity_sampled": (), "parity_given": (*ALONE, "parity.completions=given")}


@dataclass(frozen=True)
class Run:
    """One command line and where its outputs lie."""

    name: str
    arguments: tuple[str, ...]  # what follows `megatron-rlt`
    folder: Path  # of the run's outputs
    table: str = ""  # Parquet files with a row per explanation or answer: a pattern below the folder; empty: none
    by_row: bool = True  # False: one hash per step and column instead of every row's values


def make_inputs(out: Path) -> None:
    """Write model, rows and configurations that the tiny runs read; the same bytes each time."""
    assets = make_assets(out / "assets", seed=0, num_rows=256)
    save_model(out / "other", seed=1)
    rows = [json.loads(line) for line in assets.train.read_text().splitlines()[:12]]
    explained = [{**row, "explanation": row["reasoning_trace"]} for row in rows]
    _write_rows(out / "few.jsonl", rows)
    _write_rows(out / "explained.jsonl", [*explained, {**explained[0], "id": "again", "explanation": "ok , so"}])
    _write_rows(out / "held_out.jsonl", [json.loads(line) for line in assets.held_out.read_text().splitlines()[:20]])
    prompts = yaml.safe_load(COMMANDS["collect"][1].read_text())["prompts"]
    models = {name: {"model": str(out / f"sft_{name}" / "hf"), "dtype": "float32"} for name in ("teacher", "student")}
    score = {**models, "input": str(out / "explained.jsonl"), "prompts": prompts, "rows_per_part": 5}
    (out / COMMANDS["score"][1]).write_text(yaml.safe_dump(score))


def tiny_groups(out: Path) -> list[list[Run]]:
    """All tiny runs; a group reads what earlier groups wrote."""
    scored, *controls = (_collect(out, name, given) for name, given in COLLECT.items())
    lasting = (*_rl(out, teacher=True), "num_steps=6", "teacher.layout={pp: 2}")
    resumed = _run(out, "train_resumed", "train", lasting, "completions/*.parquet", folder="train_demo_layout")
    return [
        [_run(out, "prepare", "prepare", (f"input=[{out}/assets/train.jsonl]", "rows_per_shard=64"), folder="shards")],
        *_sft_groups(out),
        [*_rl_runs(out), *_runs_without_training(out), scored],
        [resumed, _collect_by_checkpoint(out), controls[0]],
        *([control] for control in controls[1:]),
        _reweigh_runs(out),
    ]


def demo_groups(out: Path) -> list[list[Run]]:
    """The demo's stages up to its RL: batches, models and configuration at full size."""
    make_assets(out / "demo" / "assets", seed=0, num_rows=NUM_ROWS)
    stages = {stage.name: stage for stage in experiment(out / "demo", 0)}
    groups = []
    for name, given in DEMO.items():
        result = stages[name].result
        folder, table = (result.parent, "completions/*.parquet") if result.name == "hf" else (result, "")
        groups.append([Run(f"demo_{name}", (*stages[name].arguments, *given), folder, table, by_row=False)])
    return groups


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(out: Path, name: str, command: str, given: tuple[str, ...], table: str = "", *, folder: str = "") -> Run:
    word, config = COMMANDS[command]
    target = out / (folder or name)
    return Run(name, (word, str(out / config), *given, f"output_dir={target}"), target, table)


def _sft_groups(out: Path) -> list[list[Run]]:
    """The student, then the teacher from its weights: both learn enough for varied rewards; and other layouts."""
    data, untrained = f"data.path={out}/shards", f"model.model={out}/assets/model"
    long = (*SMALL_SFT, data, "num_steps=150", "checkpoint.interval_steps=100")
    short = (*SMALL_SFT, data, untrained, "num_steps=3", f"evaluation={{data: {out}/few.jsonl, interval_steps: 2}}")
    layouts = {"sft_tp2sp": WHOLE, "sft_pp2": "{pp: 2}", "sft_cp2": "{cp: 2}"}
    others = [_run(out, name, "sft_teacher", (*short, f"model.layout={way}")) for name, way in layouts.items()]
    teacher = _run(out, "sft_teacher", "sft_teacher", (*long, f"model.model={out}/sft_student/hf"))
    return [[_run(out, "sft_student", "sft_student", (*long, untrained)), *others], [teacher]]


def _rl(out: Path, *, teacher: bool) -> tuple[str, ...]:
    models = (f"teacher.model={out}/sft_teacher/hf",) if teacher else ()
    return (*SMALL_RL, *models, f"student.model={out}/sft_student/hf", f"data.path={out}/shards")


def _rl_runs(out: Path) -> list[Run]:
    second, third = (f"students.extra.{name}={{model: {out}/other, dtype: float32}}" for name in ("second", "third"))
    ways: dict[str, tuple[str, ...]] = {
        **TRAIN,
        "train_students": (second, third, "students.extra.third.layout={pp: 2}", "students.held_out=third"),
        "train_students_minimum": (*ALONE, second, "students.reduction=minimum"),
    }
    runs = [
        _run(out, name, "train", (*_rl(out, teacher=True), *given), "completions/*.parquet")
        for name, given in ways.items()
    ]
    return [*runs, _run(out, "rlvr", "rlvr", (*_rl(out, teacher=False), RLVR, "grpo.reference.beta=0.05"))]


def _runs_without_training(out: Path) -> list[Run]:
    parity = (*_rl(out, teacher=True), "parity.num_rows=4")
    evaluate = (QUIET, f"model.model={out}/sft_student/hf", f"data={out}/held_out.jsonl", "questions_per_part=8")
    return [
        *(
            _run(out, name, "score", (QUIET, f"output={out}/{name}/scores.parquet", *given), "scores.parquet")
            for name, given in SCORE.items()
        ),
        *(_run(out, name, "evaluate", (*evaluate, *given), "verdicts.parquet") for name, given in EVALUATE.items()),
        *(_run(out, name, "parity", (*parity, *given)) for name, given in PARITY.items()),
    ]


def _collect(out: Path, place: str, given: tuple[str, ...]) -> Run:
    """Explanations with rewards, best of three; `place` is the folder of a scoring."""
    models = (f"teacher.model={out}/sft_teacher/hf", f"student={{model: {out}/sft_student/hf, dtype: float32}}")
    sampling = (f"data={out}/few.jsonl", "num_explanations=3", "questions_per_part=5", "selection.rule=best_of_n")
    settings = (QUIET, *models, *sampling, *given)
    return _run(
        out,
        f"collect_{place}",
        "collect",
        settings,
        f"{place.replace('placebo', 'control')}/explanations.parquet",
        folder="collect",
    )


def _collect_by_checkpoint(out: Path) -> Run:
    """Explanations without a student, by the weights of a checkpoint."""
    teacher = (f"teacher.model={out}/sft_teacher/hf", f"teacher_checkpoint={out}/train_pp2/checkpoints/step-000002")
    settings = (QUIET, *teacher, "world_size=1", f"data={out}/few.jsonl", "num_explanations=2", "selection.rule=all")
    return _run(out, "collect_unscored", "collect", settings, "unscored/explanations.parquet")


def _reweigh_runs(out: Path) -> list[Run]:
    places = {
        "train": "train_pp2",
        "collect": "collect/scored/explanations.parquet",
        "score": "score_own/scores.parquet",
    }
    folders = {out / f"reweigh_{name}": str(out / place) for name, place in places.items()}
    return [
        Run(folder.name, ("reweigh", source, f"{folder}/rewards.parquet", *OTHER_REWARD), folder, "rewards.parquet")
        for folder, source in folders.items()
    ]
