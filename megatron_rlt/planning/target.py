"""The configuration that is planned: its command, found by the keys it names, and its models' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.loading import load_config, read_tree
from megatron_rlt.config.models import Shapes
from megatron_rlt.config.section import Section
from megatron_rlt.given_files import FaultsError


@dataclass(frozen=True)
class Target:
    """A checked configuration. Its files need not exist, but for each model's config.json."""

    command: str
    config: JobConfig
    shapes: Shapes


def load_target(plan: PlanConfig) -> Target:
    """Read and check it. Raises ValueError with one line per broken rule."""
    overrides = list(plan.overrides)
    if plan.nodes is not None:
        overrides.append(f"world_size={plan.nodes * plan.gpus_per_node}")
    command = command_of(read_tree(plan.config, overrides), source=str(plan.config))
    config = load_config(COMMANDS[command].config_class, plan.config, overrides)
    assert isinstance(config, JobConfig), "only commands that run models are found"
    shapes = {name: Architecture.from_folder(model.model) for name, model in config.models.items()}
    faults = config.faults(shapes)
    if faults:
        raise FaultsError(faults)
    return Target(command, config, shapes)


def command_of(tree: Mapping[str, Any], *, source: str) -> str:
    """The command whose keys these are. Raises ValueError for a configuration without models."""
    has_data_section = isinstance(tree.get("data"), Mapping)
    for key, command in {"verifier": "rlvr", "parity": "parity"}.items():
        if key in tree:
            return command
    if "teacher" in tree:
        return "score" if "input" in tree else "train" if has_data_section else "collect"
    if "model" in tree:
        return "sft" if has_data_section else "evaluate"
    raise ValueError(
        f"{source}: names neither teacher nor student with verifier nor model, so no model runs and nothing is to be"
        " planned; give the configuration of train, rlvr, sft, collect, score, evaluate or parity"
    )


def changed(section: Any, dotted: str, value: object) -> Any:  # noqa: ANN401 - a section of any class, returned as given
    """A copy of a configuration with another value of a dotted key; the caller checks its rules."""
    head, _, rest = dotted.partition(".")
    if isinstance(section, dict):
        return section | {head: changed(section[head], rest, value) if rest else value}
    assert isinstance(section, Section), f"{dotted} lies in no section"
    inner = changed(getattr(section, head), rest, value) if rest else value
    return section.model_copy(update={head: inner})
