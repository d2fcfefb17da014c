"""The command line: parses arguments, checks the configuration and hands it to a job.

Torch is imported only once everything that can be checked without it holds. Exit statuses: 0, 1 for a failure,
2 for bad input, 75 for saved and ended by a signal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from megatron_rlt.config.commands.collect import CollectConfig, plan_collect
from megatron_rlt.config.commands.evaluate import EvaluateConfig, plan_evaluate
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.parity import ParityConfig
from megatron_rlt.config.commands.preflight import (
    check_collect,
    check_evaluate,
    check_prepare,
    check_reweigh,
    check_score,
    check_sft,
    check_solver,
    check_train,
    count_questions,
    count_rows,
)
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.commands.rlvr import SolverConfig
from megatron_rlt.config.commands.score import ScoreConfig, plan_score
from megatron_rlt.config.commands.sft import SftConfig, plan_sft
from megatron_rlt.config.commands.train import TrainConfig, plan_train
from megatron_rlt.config.display import show_keys, show_plan
from megatron_rlt.config.loading import has_section, load_config, load_overrides, to_yaml
from megatron_rlt.config.plan import Plan
from megatron_rlt.config.sections import Section

if TYPE_CHECKING:
    from megatron_rlt.launch.watchdog import Heartbeat


Config = TypeVar("Config", bound=JobConfig)


_BAD_INPUT = 2


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train Reinforcement Learned Teachers (arXiv 2506.08388) on Megatron. Every command takes CONFIG.yaml and "
    "overrides such as student.layout.tp=2; COMMAND --help-config lists the keys.",
)


def _keys_option(config_class: type[Section]) -> Any:  # noqa: ANN401 - typer's option record
    def show(asked: bool) -> None:
        if asked:
            show_keys(config_class, Console())
            raise typer.Exit

    return typer.Option(
        "--help-config", is_eager=True, callback=show, help="List every key with its default and meaning, and exit."
    )


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration; only what differs.")]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys that win over the file, such as grpo.group_size=8."),
]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved configuration and every derived number, and exit.")
]


@app.command()
def prepare(
    config_file: ConfigFile,
    overrides: Overrides = None,
    _help_config: Annotated[bool, _keys_option(PrepareConfig)] = False,
) -> int:
    """Turn rows (JSONL, Parquet, Hugging Face data set) into validated webdataset shards."""
    config = load_config(PrepareConfig, config_file, overrides or [])
    check_prepare(config)
    from megatron_rlt.jobs.prepare import run_prepare

    run_prepare(config)
    return 0


@app.command()
def sft(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(SftConfig)] = False,
) -> int:
    """Train one model on rows with a reasoning trace: a teacher's warm-up or a student's distillation."""
    config = load_config(SftConfig, config_file, overrides or [])
    shapes = check_sft(config)
    if dry_run:
        return _show(config, plan_sft(config, shapes, num_rows=count_rows(config.data.path)))
    return _launch(_sft_on_rank, config)


@app.command()
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(TrainConfig)] = False,
) -> int:
    """Train a teacher with the RLT reward; with a `verifier` section, a student rewarded for right answers."""
    if has_section(config_file, overrides or [], "verifier"):
        solver = load_config(SolverConfig, config_file, overrides or [])
        shapes = check_solver(solver)
        return _show(solver, plan_train(solver, shapes)) if dry_run else _launch(_solver_on_rank, solver)
    config = load_config(TrainConfig, config_file, overrides or [])
    shapes = check_train(config)
    return _show(config, plan_train(config, shapes)) if dry_run else _launch(_train_on_rank, config)


@app.command()
def collect(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(CollectConfig)] = False,
) -> int:
    """Collect a teacher's explanations of a data set, with rewards by a student, and select training rows."""
    config = load_config(CollectConfig, config_file, overrides or [])
    shapes = check_collect(config)
    if dry_run:
        return _show(config, plan_collect(config, shapes, num_rows=count_rows(config.data)))
    return _launch(_collect_on_rank, config)


@app.command()
def score(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(ScoreConfig)] = False,
) -> int:
    """Compute the RLT reward of explanations that already exist, without training."""
    config = load_config(ScoreConfig, config_file, overrides or [])
    shapes = check_score(config)
    if dry_run:
        return _show(config, plan_score(config, shapes))
    return _launch(_score_on_rank, config)


@app.command(context_settings={"ignore_unknown_options": True})
def reweigh(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Parquet file of `score` or `collect`, or a run folder of `train`.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUTPUT] [KEY=VALUE]...",
            help="Parquet file to write, then what the reward gets otherwise, such as reward.lambda_kl=1 or"
            " --reward.lambda_kl=1.",
        ),
    ] = None,
    _help_config: Annotated[bool, _keys_option(ReweighConfig)] = False,
) -> int:
    """Compute stored rewards again with other coefficients, without a model: what would the ranking have been?"""
    given, overrides = {"source": str(source)}, [word.removeprefix("--") for word in words or []]
    if overrides and "=" not in overrides[0]:
        given["output"] = overrides.pop(0)
    config = load_overrides(ReweighConfig, given, overrides)
    check_reweigh(config)
    from megatron_rlt.jobs.reweigh import run_reweigh

    run_reweigh(config)
    return 0


@app.command()
def evaluate(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(EvaluateConfig)] = False,
) -> int:
    """Let a model answer questions and judge the answers: avg@k, maj@k, pass@k, a verdict for every answer."""
    config = load_config(EvaluateConfig, config_file, overrides or [])
    shapes = check_evaluate(config)
    if dry_run:
        return _show(config, plan_evaluate(config, shapes, num_questions=count_questions(config)))
    return _launch(_evaluate_on_rank, config)


@app.command()
def parity(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: Annotated[bool, _keys_option(ParityConfig)] = False,
) -> int:
    """Compare log-probs of the same tokens by transformers, Megatron in a `train`'s layouts, and its engine."""
    config = load_config(ParityConfig, config_file, overrides or [])
    shapes = check_train(config)
    return _show(config, plan_train(config, shapes)) if dry_run else _launch(_parity_on_rank, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user's fault is one line a fault on stderr."""
    try:
        status: int = app(args=arguments, prog_name="megatron-rlt", standalone_mode=False)
    except (typer.TyperException, ValueError) as fault:
        message = fault.format_message() if isinstance(fault, typer.TyperException) else str(fault)
        for line in message.splitlines():
            sys.stderr.write(f"megatron-rlt: error: {line}\n")
        return _BAD_INPUT
    return status


def _show(config: Section, plan: Plan) -> int:
    console = Console()
    console.print(to_yaml(config), markup=False, highlight=False, soft_wrap=True)
    show_plan(plan, console)
    return 0


def _launch(job: Callable[[Config, Heartbeat], int], config: Config) -> int:
    from megatron_rlt.launch.launch import run_job

    return run_job(job, config, config.world_size)


def _sft_on_rank(config: SftConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.sft import run_sft

    return run_sft(config, heartbeat)


def _train_on_rank(config: TrainConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.train.run import run_train

    return run_train(config, heartbeat)


def _collect_on_rank(config: CollectConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.collect.run import run_collect

    return run_collect(config, heartbeat)


def _solver_on_rank(config: SolverConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.rlvr.run import run_solver

    return run_solver(config, heartbeat)


def _score_on_rank(config: ScoreConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.score.run import run_score

    return run_score(config, heartbeat)


def _evaluate_on_rank(config: EvaluateConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.evaluate.run import run_evaluate

    return run_evaluate(config, heartbeat)


def _parity_on_rank(config: ParityConfig, heartbeat: Heartbeat) -> int:
    from megatron_rlt.jobs.parity.run import run_parity

    return run_parity(config, heartbeat)
