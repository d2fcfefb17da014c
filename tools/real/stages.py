"""The stages of `make real`, each one `megatron-rlt` command on a file of `configs/real/`.

Layouts compared with transformers; frozen student and warm teacher by `sft`; RLT; held-out explanations of the warm and
of the RL teacher, scored beside a control; three fresh students of one budget, distilled on the traces as they are and
on either teacher's explanations; all of them, and the model they began as, evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tools.real.inputs import ASKED, CONFIGS, EXPLAINED, MODEL, TRAIN
from tools.real.layouts import layout_stages
from tools.real.sizes import ANSWER, CONTROL, EXPLANATION, REWARD, RL_COMPLETION, Size, each_seconds, sft_seconds
from tools.staged import Stage

TEACHERS = {"warm": "the warm teacher", "rlt": "the RL teacher"}
_WEIGHTS = {"warm": Path("warmup/hf"), "rlt": Path("rlt/hf")}
STUDENTS = {"original": "the noisy traces", "warm": "the warm teacher's", "rlt": "the RL teacher's"}
"""Students by what they are distilled on."""
UNTAUGHT = "untaught"
"""The model before it is distilled, asked as the students are."""
CONTROL_NAME = "other_question"
RL = "rlt"


def stages(folder: Path, size: Size, seed: int) -> tuple[Stage, ...]:
    """All stages in their order, each reading what an earlier one wrote."""
    asked = [_evaluation(folder, size, seed, name, greedy=True) for name in (UNTAUGHT, *STUDENTS)]
    sampled = [_evaluation(folder, size, seed, name, greedy=False) for name in STUDENTS]
    return (
        *layout_stages(folder),
        _sft(folder, seed, "scorer", "The frozen student: SFT on the noisy traces", MODEL, TRAIN, size.scorer_steps),
        _sft(
            folder,
            seed,
            "warmup",
            "The teacher's warm-up: SFT in the teacher's format",
            Path("scorer/hf"),
            TRAIN,
            size.warmup_steps,
        ),
        _rlt(folder, size, seed),
        *(_explanations(folder, seed, name, f"held_out_{name}", ASKED, size.num_asked) for name in TEACHERS),
        *(_rewards(folder, size, seed, name, control=control) for name in TEACHERS for control in (False, True)),
        *(_explanations(folder, seed, name, f"explain_{name}", EXPLAINED, size.num_explained) for name in TEACHERS),
        *(_student(folder, size, seed, name) for name in STUDENTS),
        *asked,
        *sampled,
    )


def on_one_rank(chain: Iterable[Stage]) -> tuple[Stage, ...]:
    """The same on one rank, such as one GPU; without the comparison of layouts, which needs several."""
    alone = [
        replace(stage, overrides=(*stage.overrides, "world_size=1")) for stage in chain if stage.command != "parity"
    ]
    return tuple(
        replace(stage, overrides=(*stage.overrides, "student.layout={}")) if stage.name == RL else stage
        for stage in alone
    )


def traces_file(name: str) -> Path:
    """The rows that a student is distilled on, within the folder."""
    return EXPLAINED if name == "original" else Path(f"explain_{name}/unscored/sft_first.jsonl")


def explanations_file(name: str) -> Path:
    """A teacher's explanations of held-out questions, within the folder."""
    return Path(f"held_out_{name}/unscored/explanations.parquet")


def rewards_file(name: str, *, control: bool) -> Path:
    """Their rewards, or those of other questions' explanations in their place."""
    return Path(f"{'control' if control else 'reward'}_{name}/rewards.parquet")


def evaluation_folder(name: str, *, greedy: bool) -> Path:
    """A student's answers to held-out questions, within the folder."""
    return Path(f"evaluate_{name}_{'greedy' if greedy else 'sampled'}")


def _sft(folder: Path, seed: int, name: str, title: str, model: Path, rows: Path, num_steps: int) -> Stage:
    config = "student" if name.startswith("student") else name
    places = (f"model.model={folder / model}", f"data.path={folder / rows}", f"output_dir={folder / name}")
    return Stage(
        name,
        f"{title} (DP2)",
        "sft",
        CONFIGS / f"{config}_2cpu_dp2.yaml",
        folder / name / "hf",
        (*places, f"seed={seed}", f"num_steps={num_steps}"),
        sft_seconds(num_steps),
    )


def _student(folder: Path, size: Size, seed: int, name: str) -> Stage:
    """Equal beginnings, equal order of questions, equal number of steps: only the explanations differ."""
    title = f"A fresh student distilled on {STUDENTS[name]}"
    return _sft(folder, seed, f"student_{name}", title, MODEL, traces_file(name), size.student_steps)


def _rlt(folder: Path, size: Size, seed: int) -> Stage:
    models = (f"teacher.model={folder / _WEIGHTS['warm']}", f"student.model={folder / 'scorer' / 'hf'}")
    places = (f"data.path={folder / TRAIN}", f"output_dir={folder / RL}", f"seed={seed}")
    sizes = (
        f"num_steps={size.rl_steps}",
        f"grpo.questions_per_step={size.questions_per_step}",
        f"grpo.group_size={size.group_size}",
    )
    return Stage(
        RL,
        "RLT: teacher DP2, student PP2",
        "train",
        CONFIGS / "rlt_2cpu_dp2_pp2.yaml",
        folder / _WEIGHTS["rlt"],
        (*models, *places, *sizes),
        each_seconds(size.rl_steps * size.questions_per_step * size.group_size, RL_COMPLETION),
    )


def _explanations(folder: Path, seed: int, teacher: str, name: str, rows: Path, count: int) -> Stage:
    what = "Held-out explanations" if rows == ASKED else "Explanations to learn from"
    places = (f"teacher.model={folder / _WEIGHTS[teacher]}", f"data={folder / rows}", f"output_dir={folder / name}")
    return Stage(
        name,
        f"{what} by {TEACHERS[teacher]} (DP2)",
        "collect",
        CONFIGS / "collect_2cpu_dp2.yaml",
        folder / name / "unscored" / "sft_first.jsonl",
        (*places, f"seed={seed}"),
        each_seconds(count, EXPLANATION),
    )


def _rewards(folder: Path, size: Size, seed: int, name: str, *, control: bool) -> Stage:
    file = folder / rewards_file(name, control=control)
    title = "a control, other questions' explanations" if control else "held-out explanations"
    return Stage(
        file.parent.name,
        f"Rewards of {title}: {TEACHERS[name]} (DP2)",
        "score",
        CONFIGS / "score_2cpu_dp2.yaml",
        file,
        (
            f"teacher.model={folder / _WEIGHTS[name]}",
            f"student.model={folder / 'scorer' / 'hf'}",
            f"input={folder / explanations_file(name)}",
            f"output={file}",
            f"output_dir={file.parent}",
            f"seed={seed}",
            *((f"control={CONTROL_NAME}", "baseline=false") if control else ()),
        ),
        each_seconds(size.num_asked, CONTROL if control else REWARD),
    )


def _evaluation(folder: Path, size: Size, seed: int, name: str, *, greedy: bool) -> Stage:
    target = folder / evaluation_folder(name, greedy=greedy)
    model = folder / (MODEL if name == UNTAUGHT else f"student_{name}/hf")
    who = "the model before it is distilled" if name == UNTAUGHT else f"the student of {STUDENTS[name]}"
    # Untaught, it knows no tags: it begins its answer itself.
    begins = ("prefill_thought=false",) if name == UNTAUGHT else ()
    sampling = () if greedy else ("sampling.greedy=false", f"sampling.num_samples={size.num_samples}")
    places = (f"model.model={model}", f"data={folder / ASKED}", f"output_dir={target}", f"seed={seed}")
    return Stage(
        target.name,
        f"Held-out questions, {'greedy' if greedy else 'sampled'}: {who} (DP2)",
        "evaluate",
        CONFIGS / "evaluate_2cpu_dp2.yaml",
        target / "results.json",
        (*places, *begins, *sampling),
        each_seconds(size.num_asked * (1 if greedy else size.num_samples), ANSWER),
    )
