"""What all tests share: which of them are left out, and the preloaded program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlt.parallel.environment import set_block_scales
from tests.preloaded import preloaded_program
from tools.preloaded import start_forkserver

set_block_scales(float32=True)  # the default; Transformer Engine reads it when the first test module imports Megatron


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run tests marked `full`: see docs/testing.md")
    parser.addoption("--slurm", action="store_true", help="run the tests marked `slurm`: see docs/testing.md")


def pytest_configure(config: pytest.Config) -> None:
    """Where everything is run, the fork server imports while pytest imports and collects."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.collectonly:
        start_forkserver()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {} if config.option.full else {"full": "for `make test-all` and `make test-slurm-all`"}
    if not config.option.slurm:
        left_out["slurm"] = "for `make test-slurm`"
    if not torch.cuda.is_available():
        left_out["gpu"] = "needs an accelerator"
    for item in items:
        for marker, reason in left_out.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program as an executable that starts at once."""
    with preloaded_program(tmp_path_factory.mktemp("bin")) as program:
        yield program
