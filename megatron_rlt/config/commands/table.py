"""The commands: the configuration each reads, and the job each runs, named as text, so that none is imported early."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.convert import ConvertConfig, InspectConfig
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.job import CommandConfig
from megatron_rlt.config.commands.parity import ParityConfig
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.commands.rlvr import RlvrConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig


class Command(NamedTuple):
    """One command of the command line."""

    config_class: type[CommandConfig]  # with its rules and its plan; its docstring is the command's help
    job: str  # "module:function" of (configuration, heartbeat) on every rank, or of (configuration) in this process


COMMANDS = {
    "prepare": Command(PrepareConfig, "megatron_rlt.jobs.prepare:run_prepare"),
    "sft": Command(SftConfig, "megatron_rlt.jobs.sft:run_sft"),
    "train": Command(TrainConfig, "megatron_rlt.jobs.train.run:run_train"),
    "rlvr": Command(RlvrConfig, "megatron_rlt.jobs.rlvr.run:run_rlvr"),
    "collect": Command(CollectConfig, "megatron_rlt.jobs.collect.run:run_collect"),
    "score": Command(ScoreConfig, "megatron_rlt.jobs.score.run:run_score"),
    "reweigh": Command(ReweighConfig, "megatron_rlt.jobs.reweigh:run_reweigh"),
    "evaluate": Command(EvaluateConfig, "megatron_rlt.jobs.evaluate.run:run_evaluate"),
    "parity": Command(ParityConfig, "megatron_rlt.jobs.parity.run:run_parity"),
    "plan": Command(PlanConfig, "megatron_rlt.jobs.plan:run_plan"),
    "convert": Command(ConvertConfig, "megatron_rlt.jobs.convert.run:run_convert"),
    "inspect": Command(InspectConfig, "megatron_rlt.jobs.convert.inspect:run_inspect"),
}


def load_job(job: str) -> Any:  # noqa: ANN401 - a function of the command's own configuration
    """Import a job's function."""
    module, _, function = job.partition(":")
    return getattr(import_module(module), function)
