"""Inputs that all tests of whole runs share."""

from __future__ import annotations

import pytest

from tests.distributed.tiny_runs import TinyInputs, tiny_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """Ten rows: small runs pass the end of an epoch."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=10)
