"""What a vLLM server that this project starts can be asked about its weights, which vLLM itself does not show.

A server's workers load this module by `--worker-extension-cls`, so it imports little.
"""

from __future__ import annotations

from typing import Any

from megatron_rlt.models.checksum import checksums_held


class ShownWeights:
    """Methods that vLLM adds to its worker."""

    model_runner: Any  # the worker's

    def checksums_held(self, names: list[str]) -> dict[str, str]:
        """SHA-256 of those of the named weights that the worker holds whole and as they came."""
        return checksums_held(self.model_runner.model, names)
