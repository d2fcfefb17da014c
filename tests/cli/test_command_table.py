"""The table of commands names jobs as text; that the functions are there is found here, without running one."""

from __future__ import annotations

import inspect

import pytest

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.table import COMMANDS, load_job


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_is_a_function_of_its_configuration_and_on_ranks_of_a_heartbeat(name: str) -> None:
    config_class, job = COMMANDS[name]
    assert job.startswith("megatron_rlt.jobs.")
    parameters = inspect.signature(load_job(job), eval_str=True).parameters
    assert issubclass(config_class, next(iter(parameters.values())).annotation)
    assert list(parameters)[1:] == (["heartbeat"] if issubclass(config_class, JobConfig) else [])
