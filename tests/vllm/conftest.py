"""These tests run vLLM itself and are left out where it is not installed: `make test-vllm` makes an environment."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.vllm.server_plugin import PYTHONPATH


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of commands that the test starts load the tests' plugin."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is not None:
        return
    for item in items:
        if "tests/vllm" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs vLLM"))
