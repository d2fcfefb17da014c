"""What the tests change in vLLM's servers. vLLM itself loads it, as a plugin, in each of a server's processes.

Processes are forked where vLLM spawns them on a CPU: what a process has imported, its children need not import again,
which makes a start cost 17 seconds of one core instead of 41. And gloo broadcasts in NCCL's place.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

from tests.vllm.gloo_transfer import replace_nccl

_HERE = Path(__file__).parent
# In `plugin` lies the metadata of a package that names `load`.
PYTHONPATH = f"{_HERE / 'plugin'}:{_HERE.parents[1]}"


def use_plugin() -> None:
    """Servers that this process starts from now on load it."""
    os.environ["PYTHONPATH"] = PYTHONPATH


def load() -> None:
    """Called by vLLM."""
    import vllm.utils.system_utils

    vllm.utils.system_utils.multiprocessing = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    replace_nccl()
