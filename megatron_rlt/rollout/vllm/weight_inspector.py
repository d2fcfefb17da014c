"""A vLLM worker extension that shows the weights a worker holds, which vLLM itself does not.

A server's workers import this module by `--worker-extension-cls`, so it imports little.
"""

from __future__ import annotations

from typing import Any

from megatron_rlt.models.checksum import checksums_held


class WeightInspector:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any  # the worker's

    def checksums_held(self, names: list[str]) -> dict[str, str]:
        """SHA-256 of each named weight that the worker holds whole, in the form in which it was sent."""
        return checksums_held(self.model_runner.model, names)
