"""What several files of `collect` share; other files override `inputs` by their own."""

from __future__ import annotations

import pytest

from megatron_rlt.config.commands.collect import CollectConfig
from tests.jobs.tiny_collect import NUM_PARTS, CollectInputs, collect_inputs, collect_on_ranks
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> CollectInputs:
    return collect_inputs(tmp_path_factory.mktemp("collect"))


@pytest.fixture(scope="session")
def collected(inputs: CollectInputs, tmp_path_factory: pytest.TempPathFactory) -> CollectConfig:
    """A run on one rank that nobody interrupted."""
    config = inputs.config(tmp_path_factory.mktemp("collected"))
    ((status, phases),) = run_ranks(collect_on_ranks, 1, config)
    assert (status, phases.count("rollout"), phases.count("student")) == (0, NUM_PARTS, NUM_PARTS)
    return config
