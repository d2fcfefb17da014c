"""The commands of the campaign: each on the demo's tiny random model, in seconds, with what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.data.prepare import prepare_shards
from tools.chaos.outcome import Results, hashes, row_results, training_results
from tools.demo.make_assets import make_assets
from tools.demo.stages import CONFIGS

_NUM_ROWS, _NUM_ASKED = 12, 7
_NUM_PREPARED = 60
_TRAINING = (
    "checkpoint.interval_steps=1",
    "checkpoint.keep_last=1",  # a save removes the checkpoint before
    "data.shuffle_buffer_size=4",
    "metrics.tensorboard=false",
    "num_steps=4",
)
_RL = (
    "grpo.questions_per_step=2",
    "grpo.group_size=2",
    "grpo.micro_batch_size=2",
    "rollout.max_completion_tokens=6",
    "optimizer.lr=2e-3",
    "optimizer.warmup_fraction=0",
)
_PARTS = ("metrics.tensorboard=false",)


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    model: Path
    shards: Path
    rows: Path  # JSONL with traces
    questions: Path  # JSONL
    explanations: Path  # JSONL
    score_config: Path


@dataclass(frozen=True)
class Case:
    """One command on a number of ranks. Everything that it writes lies below the root that it is given."""

    name: str
    command: str
    num_ranks: int
    arguments: Callable[[Path], list[str]]
    lock: str  # relative to the root; it is there while the command writes
    results: Callable[[Path], Results]
    ends_once: bool = False  # refuses what it has written already


def make_inputs(folder: Path) -> Inputs:
    """Model, rows and shards; the same bytes each time."""
    assets = make_assets(folder / "assets", seed=0, num_rows=_NUM_PREPARED)
    rows = _first_lines(assets.train, folder / "rows.jsonl", _NUM_ROWS)
    shards = folder / "shards"
    prepare_shards(PrepareConfig(input=(str(rows),), output_dir=shards, rows_per_shard=4))
    explanations = folder / "explanations.jsonl"
    explanations.write_text(rows.read_text().replace('"reasoning_trace"', '"explanation"'))
    return Inputs(
        assets.model,
        shards,
        assets.train,
        _first_lines(assets.held_out, folder / "questions.jsonl", _NUM_ASKED),
        explanations,
        _score_config(folder / "score.yaml"),
    )


def cases(inputs: Inputs) -> list[Case]:
    """All commands that write, on one rank and, where they have ranks, on two."""
    ranked = [
        make(inputs, num_ranks) for make in (_sft, _train, _rlvr, _collect, _score, _evaluate) for num_ranks in (1, 2)
    ]
    return [_prepare(inputs), _convert(inputs), *ranked]


def _prepare(inputs: Inputs) -> Case:
    def arguments(root: Path) -> list[str]:
        settings = [f"input=[{inputs.rows}]", "rows_per_shard=6"]
        return ["prepare", str(CONFIGS / "prepare.yaml"), *settings, f"output_dir={root / 'shards'}"]

    return Case("prepare", "prepare", 1, arguments, ".shards.lock", lambda root: hashes(root / "shards"))


def _convert(inputs: Inputs) -> Case:
    def arguments(root: Path) -> list[str]:
        return ["convert", str(inputs.model), str(root / "converted"), "--to", "megatron"]

    def results(root: Path) -> Results:
        return hashes(root / "converted")

    return Case("convert", "convert", 1, arguments, ".converted.lock", results, ends_once=True)


def _sft(inputs: Inputs, num_ranks: int) -> Case:
    settings = [
        "global_batch_size=4",
        "micro_batch_size=2",
        f"model.model={inputs.model}",
        f"data.path={inputs.shards}",
    ]
    return _training("sft", "scorer_2cpu_dp2.yaml", num_ranks, settings)


def _train(inputs: Inputs, num_ranks: int) -> Case:
    models = [f"teacher.model={inputs.model}", f"student.model={inputs.model}"]
    alone = ["teacher.layout={tp: 1, sp: false}"] if num_ranks == 1 else []
    return _training(
        "train", "rlt_2cpu_tp2sp_dp2.yaml", num_ranks, [*_RL, *models, *alone, f"data.path={inputs.shards}"]
    )


def _rlvr(inputs: Inputs, num_ranks: int) -> Case:
    alone = ["student.layout={tp: 1, sp: false}"] if num_ranks == 1 else []
    signal = ["verifier.max_sampling_rounds=1", "verifier.well_formed_bonus=0.5", "optimizer.max_skipped_steps=100"]
    models = [f"student.model={inputs.model}", f"data.path={inputs.shards}"]
    return _training("rlvr", "rlvr_2cpu_tp2sp.yaml", num_ranks, [*_RL, *signal, *models, *alone])


def _training(command: str, config: str, num_ranks: int, settings: list[str]) -> Case:
    def arguments(root: Path) -> list[str]:
        ranks = f"world_size={num_ranks}"
        return [command, str(CONFIGS / config), *_TRAINING, *settings, ranks, f"output_dir={root / 'run'}"]

    def results(root: Path) -> Results:
        return training_results(root / "run")

    return Case(_name(command, num_ranks), command, num_ranks, arguments, "run/.lock", results)


def _collect(inputs: Inputs, num_ranks: int) -> Case:
    settings = [
        *_PARTS,
        f"teacher.model={inputs.model}",
        f"student={{model: {inputs.model}, dtype: float32}}",
        f"data={inputs.shards}",
        "num_explanations=2",
        "questions_per_part=3",
        "rollout.max_completion_tokens=8",
        "selection.rule=best_of_n",
    ]
    return _in_parts("collect", CONFIGS / "collect_2cpu_dp2.yaml", num_ranks, settings)


def _evaluate(inputs: Inputs, num_ranks: int) -> Case:
    settings = [
        *_PARTS,
        f"model.model={inputs.model}",
        f"data={inputs.questions}",
        "sampling={greedy: false, temperature: 1.0, num_samples: 2, max_completion_tokens: 8}",
        "questions_per_part=2",
    ]
    return _in_parts("evaluate", CONFIGS / "evaluate_2cpu_dp2.yaml", num_ranks, settings)


def _score(inputs: Inputs, num_ranks: int) -> Case:
    models = [f"{name}={{model: {inputs.model}, dtype: float32}}" for name in ("teacher", "student")]
    settings = [*_PARTS, *models, f"input={inputs.explanations}", "rows_per_part=3"]
    return _in_parts("score", inputs.score_config, num_ranks, settings, output="scores.parquet")


def _in_parts(command: str, config: Path, num_ranks: int, settings: list[str], output: str | None = None) -> Case:
    def arguments(root: Path) -> list[str]:
        places = [f"output_dir={root / 'run'}", *([f"output={root / output}"] if output else [])]
        return [command, str(config), *settings, f"world_size={num_ranks}", *places]

    return Case(_name(command, num_ranks), command, num_ranks, arguments, "run/.lock", row_results)


def _name(command: str, num_ranks: int) -> str:
    return f"{command}-{num_ranks}"


def _first_lines(source: Path, target: Path, count: int) -> Path:
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return target


def _score_config(file: Path) -> Path:
    """The demo has no `score`: the prompts are those of its `collect`; models and files are given as overrides."""
    prompts = yaml.safe_load((CONFIGS / "collect_2cpu_dp2.yaml").read_text())["prompts"]
    file.write_text(yaml.safe_dump({"prompts": prompts, "temperature": 1.0}))
    return file
