"""The command line: parses arguments, checks the configuration and hands it to the command's job.

Torch is imported only once everything that can be checked without it holds. Exit statuses: 0, 1 for a failure,
2 for bad input, 75 for saved and ended by a signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from megatron_rlt.config.commands.job import JobConfig, WatchdogConfig
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.commands.table import COMMANDS, load_job
from megatron_rlt.config.display import show_keys, show_plan
from megatron_rlt.config.loading import has_section, load_config, load_overrides, to_yaml
from megatron_rlt.disk_faults import DiskError, disk_refusals
from megatron_rlt.given_files import lines_of
from megatron_rlt.visible_text import one_line

if TYPE_CHECKING:
    from megatron_rlt.launch.watchdog import Heartbeat

_FAILED, _BAD_INPUT = 1, 2
_DOCTOR_SECONDS = 90.0  # what a node that does not answer costs
_START_ALONE = "megatron_rlt.jobs.run.start:start_alone"
_SERVE = "megatron_rlt.jobs.serve:run_serve"
_START_ON_RANK = "megatron_rlt.jobs.run.start:start_on_rank"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train Reinforcement Learned Teachers (arXiv 2506.08388) on Megatron-core. Most commands take CONFIG.yaml and "
    "overrides such as student.layout.tp=2; their --help-config lists the keys.",
)


def _show_keys(context: typer.Context, asked: bool) -> None:
    if asked:
        show_keys(COMMANDS[str(context.info_name)].config_class, Console())
        raise typer.Exit


HelpConfig = Annotated[
    bool,
    typer.Option(
        "--help-config", is_eager=True, callback=_show_keys, help="List every key with default and meaning, and exit."
    ),
]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="YAML file; only what differs from the defaults.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys that win over the file, such as grpo.group_size=8."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved configuration and every derived number, and exit.")
]


def _run(
    context: typer.Context,
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    _help_config: HelpConfig = False,
) -> int:
    name = str(context.info_name)
    if name == "train" and has_section(config_file, overrides or [], "verifier"):
        name = "rlvr"
        sys.stderr.write("megatron-rlt: the configuration has a `verifier` section, so this runs `megatron-rlt rlvr`\n")
    command = COMMANDS[name]
    config = load_config(command.config_class, config_file, overrides or [])
    shapes = config.check()
    if dry_run:
        console = Console()
        lines = to_yaml(config).split("\n")
        console.print("\n".join(map(one_line, lines)), markup=False, highlight=False, soft_wrap=True)
        show_plan(config.plan(shapes), console)
        return 0
    if not isinstance(config, JobConfig):
        load_job(_START_ALONE)(load_job(command.job), config)
        return 0
    from megatron_rlt.launch.launch import run_job

    return run_job(partial(_job_on_rank, command.job), config, config.world_size)


def _reweigh(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Parquet file of `score` or `collect`, or a run folder of `train`.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUTPUT] [KEY=VALUE]...",
            help="Parquet file to write, then settings of the reward, such as reward.lambda_kl=1 or"
            " --reward.lambda_kl=1; all others stay as stored.",
        ),
    ] = None,
    _help_config: HelpConfig = False,
) -> int:
    given, overrides = {"source": str(source)}, [word.removeprefix("--") for word in words or []]
    if overrides and ("=" not in overrides[0] or "/" in overrides[0].partition("=")[0]):  # a path may hold "="
        given["output"] = overrides.pop(0)
    config = load_overrides(ReweighConfig, given, overrides)
    config.check()
    load_job(_START_ALONE)(load_job(COMMANDS["reweigh"].job), config)
    return 0


def _status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of a command.")],
) -> int:
    """Say how far a run is, from any machine that sees its folder: step, rate, time left, ranks, the first failure."""
    from megatron_rlt.cluster.status import status_lines

    for line in status_lines(run_folder, now=time.time()):
        sys.stdout.write(f"{one_line(line)}\n")
    return 0


def _pipeline(
    pipeline_file: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Stages; see configs/pipelines.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys that win over the file, such as stages.rl.nodes=4."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every sbatch line, and exit.")] = False,
    show_status: Annotated[bool, typer.Option("--status", help="Say how far each stage is, and exit.")] = False,
) -> int:
    """Submit a chain of jobs to Slurm, each after those before it; called again, it submits what is missing."""
    from megatron_rlt.cluster.pipeline import load_stages, show, submit

    stages = load_stages(pipeline_file, overrides or [])
    for line in show(stages) if show_status else submit(stages, dry_run=dry_run):
        sys.stdout.write(f"{line}\n")
    return 0


RankedCommand = Annotated[str, typer.Argument(metavar="COMMAND", help="The command that will run, such as train.")]


def _doctor(command: RankedCommand, config_file: ConfigFile, overrides: Overrides = None) -> int:
    """Check nodes, run folder, GPUs and network in seconds, before a command loads its models. Changes nothing."""
    config = _ranked_config("doctor", command, config_file, overrides or [])
    shapes = config.check()
    from megatron_rlt.cluster.doctor import run_doctor
    from megatron_rlt.launch.launch import run_job

    quick = config.model_copy(update={"watchdog": WatchdogConfig(timeout_seconds=_DOCTOR_SECONDS)})
    return run_job(partial(run_doctor, shapes), quick, config.world_size)


def _serve(
    command: RankedCommand,
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would start here, and exit.")] = False,
) -> int:
    """Run the vLLM servers of one node of a job with SERVER_NODES; the job's script starts and ends it."""
    config = _ranked_config("serve", command, config_file, overrides or [])
    shapes = config.check()
    status: int = load_job(_SERVE)(config, shapes, dry_run=dry_run)
    return status


def _ranked_config(asks: str, command: str, config_file: Path, overrides: list[str]) -> JobConfig:
    """The configuration of a command that runs on ranks."""
    if command == "train" and has_section(config_file, overrides, "verifier"):
        command = "rlvr"
    config_class = COMMANDS[command].config_class if command in COMMANDS else None
    if config_class is None or not issubclass(config_class, JobConfig):
        ranked = ", ".join(name for name, one in COMMANDS.items() if issubclass(one.config_class, JobConfig))
        raise ValueError(f"{asks} {command}: is no command that runs on ranks; give one of {ranked}")
    return load_config(config_class, config_file, overrides)


def _plan(
    config_file: ConfigFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of plan, such as device=h200 or nodes=4, and of the configuration, such as student.layout.tp=4.",
        ),
    ] = None,
    _help_config: HelpConfig = False,
) -> int:
    own = [word for word in words or [] if word.partition("=")[0] in PlanConfig.model_fields]
    others = [word for word in words or [] if word not in own]
    config = load_overrides(PlanConfig, {"config": str(config_file), "overrides": others}, own)
    config.check()
    load_job(COMMANDS["plan"].job)(config)
    return 0


ModelConfigFolder = Annotated[
    Path | None, typer.Option("--config", metavar="FOLDER", help="Hugging Face folder that says what model it is.")
]


def _convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Model folder of any kind.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write; it must not exist yet.")],
    to: Annotated[
        str | None, typer.Option("--to", help="hf, megatron, nemo or bridge. Default: hf, if SOURCE is another kind.")
    ] = None,
    source_kind: Annotated[
        str | None, typer.Option("--from", help="Refuse SOURCE unless it is hf, megatron, nemo, bridge or fsdp.")
    ] = None,
    config: ModelConfigFolder = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Tokenizer, if SOURCE has none; `none` for weights alone."),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16. Default: SOURCE's.")] = None,
    certify: Annotated[
        str | None, typer.Option("--certify", help="logprobs, or none: tensors are compared in any case.")
    ] = None,
    optimizer: Annotated[
        bool | None, typer.Option("--optimizer", help="Convert Adam's state too, between Megatron folders.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Threads that read ahead. Default: 1.")] = None,
    max_shard_bytes: Annotated[
        int | None, typer.Option("--max-shard-bytes", help="Largest file written. Default: 5,000,000,000.")
    ] = None,
) -> int:
    options: dict[str, object] = {"to": to, "source_kind": source_kind, "config": config, "tokenizer": tokenizer}
    options |= {"dtype": dtype, "certify": certify, "optimizer": optimizer, "workers": workers}
    options |= {"max_shard_bytes": max_shard_bytes}
    return _run_given("convert", {"source": source, "target": target, **options})


def _inspect(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder of any kind.")],
    config: ModelConfigFolder = None,
) -> int:
    return _run_given("inspect", {"source": source, "config": config})


def _run_given(name: str, options: dict[str, object]) -> int:
    """Run a command whose keys are options; those that were not given keep their defaults."""
    given = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    config = load_overrides(COMMANDS[name].config_class, given, [])
    config.check()
    status: int = load_job(COMMANDS[name].job)(config)
    return status


_OWN_ARGUMENTS: dict[str, Callable[..., int]] = {
    "reweigh": _reweigh,
    "plan": _plan,
    "convert": _convert,
    "inspect": _inspect,
}
for _name, _command in COMMANDS.items():
    app.command(
        _name, help=_command.config_class.__doc__, context_settings={"ignore_unknown_options": _name == "reweigh"}
    )(_OWN_ARGUMENTS.get(_name, _run))

app.command("status")(_status)
app.command("doctor")(_doctor)
app.command("serve")(_serve)
app.command("pipeline")(_pipeline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return guarded(partial(app, args=arguments, prog_name="megatron-rlt", standalone_mode=False))


def guarded(command: Callable[[], int]) -> int:
    """The exit status of a command; each fault of the user is one line on stderr."""
    try:
        with disk_refusals():
            return command()
    except (typer.TyperException, ValueError, DiskError) as fault:
        lines = [one_line(fault.format_message())] if isinstance(fault, typer.TyperException) else lines_of(fault)
        for line in lines:
            sys.stderr.write(f"megatron-rlt: error: {line}\n")
        return _FAILED if isinstance(fault, DiskError) else _BAD_INPUT


def _job_on_rank(job: str, config: JobConfig, heartbeat: Heartbeat) -> int:
    """A job is imported in its rank, after the process group has begun to be watched."""
    status: int = load_job(_START_ON_RANK)(load_job(job), config, heartbeat)
    return status
