"""The demo's commands: the paper's experiment as a list of stages, each one `megatron-rlt` command on a shipped file.

The experiment: base scorer, teacher's warm-up, RLT, explanations of the warm and of the RL teacher, three fresh
students of one budget on the noisy traces and on either teacher's, all evaluated. The ablation: a teacher trained
with lambda = 0, the best of n explanations of the warm teacher ranked by reward, without RL, and the scorer's own RL.
"""

from __future__ import annotations

from pathlib import Path

from tools.staged import Stage

_ALONE = "world_size=1"  # stages of one rank side by side take less time than one after the other on two
CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
NUM_ROWS = 4000
NUM_RANKED = 4  # explanations of a question that best-of-n chooses from
TRACES = {
    "original": "the noisy traces",
    "warm": "the warm teacher's",
    "rlt": "the RL teacher's",
    "lambda0": "the lambda = 0 teacher's",
    "best": f"best of {NUM_RANKED}, no RL",
}
"""Students by what they are distilled on."""
EXPERIMENT, ABLATION = ("original", "warm", "rlt"), ("lambda0", "best")
OWN_RL = {"scorer": "SFT on the noisy traces alone", "rlvr": "the same, then RL on right answers"}
"""The student before and after its own RL."""


def experiment(folder: Path, seed: int, engine: str = "megatron") -> tuple[Stage, ...]:
    """The demo's stages in their order, each reading what an earlier one wrote; `engine` samples in RL."""
    shards, scorer, warm = folder / "shards", folder / "scorer" / "hf", folder / "warmup" / "hf"
    data = (f"data.path={shards}", f"seed={seed}")
    rows = (f"input=[{folder / 'assets' / 'train.jsonl'}]", f"output_dir={shards}")
    sampled = () if engine == "megatron" else (f"rollout.engine={engine}",)
    return (
        Stage("shards", "Rows to shards", "prepare", CONFIGS / "prepare.yaml", shards, rows, 7),
        Stage(
            "scorer",
            "The frozen student: SFT on the noisy traces (DP2)",
            "sft",
            CONFIGS / "scorer_2cpu_dp2.yaml",
            scorer,
            (*data, f"model.model={folder / 'assets' / 'model'}", f"output_dir={folder / 'scorer'}"),
            75,
        ),
        Stage(
            "warmup",
            "The teacher's warm-up: SFT in the teacher's format (DP2)",
            "sft",
            CONFIGS / "warmup_2cpu_dp2.yaml",
            warm,
            (*data, f"model.model={scorer}", f"output_dir={folder / 'warmup'}"),
            65,
        ),
        _rlt(folder, seed, name="rlt", title="RLT: teacher TP2 + sequence parallelism, student DP2", overrides=sampled),
        _collect(folder, seed, name="warm", teacher=warm),
        _collect(folder, seed, name="rlt", teacher=folder / "rlt" / "hf", beside=True),
        *_students(folder, seed, EXPERIMENT),
    )


def ablation(folder: Path, seed: int) -> tuple[Stage, ...]:
    """What `experiment` does not answer: no r_KL, and ranking without RL."""
    ranked = (
        f"student={{model: {folder / 'scorer' / 'hf'}, dtype: float32}}",
        f"num_explanations={NUM_RANKED}",
        "selection.rule=best_of_n",
    )
    return (
        _rlt(folder, seed, name="rlt_lambda0", title="RLT with lambda = 0", overrides=("reward.lambda_kl=0",)),
        _collect(folder, seed, name="lambda0", teacher=folder / "rlt_lambda0" / "hf"),
        _collect(folder, seed, name="best", teacher=folder / "warmup" / "hf", overrides=ranked, beside=True),
        *_students(folder, seed, ABLATION),
        _rlvr(folder, seed),
        *(_evaluation(folder, seed, name, greedy=greedy) for name in OWN_RL for greedy in (True, False)),
    )


def traces_file(folder: Path, traces: str) -> Path:
    """The rows that a student is distilled on."""
    if traces == "original":
        return folder / "shards"
    return (
        folder
        / f"collect_{traces}"
        / ("scored/sft_best_of_n.jsonl" if traces == "best" else "unscored/sft_first.jsonl")
    )


def evaluation_name(name: str, *, greedy: bool) -> str:
    """Folder of a student's evaluation."""
    return f"evaluate_{name}_{'greedy' if greedy else 'sampled'}"


def _rlt(folder: Path, seed: int, *, name: str, title: str, overrides: tuple[str, ...]) -> Stage:
    models = (f"teacher.model={folder / 'warmup' / 'hf'}", f"student.model={folder / 'scorer' / 'hf'}")
    places = (f"data.path={folder / 'shards'}", f"output_dir={folder / name}", f"seed={seed}")
    return Stage(
        name,
        title,
        "train",
        CONFIGS / "rlt_2cpu_tp2sp_dp2.yaml",
        folder / name / "hf",
        (*models, *places, *overrides),
        115,
    )


def _collect(
    folder: Path, seed: int, *, name: str, teacher: Path, overrides: tuple[str, ...] = (), beside: bool = False
) -> Stage:
    places = (f"teacher.model={teacher}", f"data={folder / 'shards'}", f"output_dir={folder / f'collect_{name}'}")
    return Stage(
        f"collect_{name}",
        f"Explanations to learn from: {TRACES[name]}",
        "collect",
        CONFIGS / "collect_2cpu_dp2.yaml",
        traces_file(folder, name),
        (*places, f"seed={seed}", _ALONE, *overrides),
        27,
        beside=beside,
    )


def _rlvr(folder: Path, seed: int) -> Stage:
    places = (f"data.path={folder / 'shards'}", f"output_dir={folder / 'rlvr'}", f"seed={seed}")
    return Stage(
        "rlvr",
        "The scorer's own RL, rewarded for right answers (TP2 + sequence parallelism)",
        "rlvr",
        CONFIGS / "rlvr_2cpu_tp2sp.yaml",
        folder / "rlvr" / "hf",
        (f"student.model={folder / 'scorer' / 'hf'}", *places),
        80,
    )


def _students(folder: Path, seed: int, names: tuple[str, ...]) -> list[Stage]:
    trained = [_student(folder, seed, name, beside=name != names[0]) for name in names]
    return trained + [_evaluation(folder, seed, name, greedy=greedy) for name in names for greedy in (True, False)]


def _student(folder: Path, seed: int, traces: str, *, beside: bool) -> Stage:
    """Equal beginnings, equal order of questions, equal number of steps: only the explanations differ."""
    target = folder / f"student_{traces}"
    places = (f"data.path={traces_file(folder, traces)}", f"output_dir={target}", f"seed={seed}")
    return Stage(
        target.name,
        f"A fresh student distilled on {TRACES[traces]}",
        "sft",
        CONFIGS / "student_2cpu_dp2.yaml",
        target / "hf",
        (f"model.model={folder / 'assets' / 'model'}", *places, _ALONE),
        130,
        beside=beside,
    )


def _evaluation(folder: Path, seed: int, name: str, *, greedy: bool) -> Stage:
    """Ask a distilled student, named by its explanations, or one of `OWN_RL`."""
    target = folder / evaluation_name(name, greedy=greedy)
    model = folder / (name if name in OWN_RL else f"student_{name}") / "hf"
    who = OWN_RL[name] if name in OWN_RL else f"The student of {TRACES[name]}"
    sampling = () if greedy else ("sampling.greedy=false", "sampling.num_samples=4")
    places = (f"data={folder / 'assets' / 'held_out.jsonl'}", f"output_dir={target}", f"seed={seed}")
    return Stage(
        target.name,
        f"{who[0].upper()}{who[1:]}: held-out questions, {'greedy' if greedy else 'sampled'}",
        "evaluate",
        CONFIGS / "evaluate_2cpu_dp2.yaml",
        target / "results.json",
        (f"model.model={model}", *places, _ALONE, *sampling),
        14,
        beside=not greedy,
    )
