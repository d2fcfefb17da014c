"""How weights travel to vLLM servers: what every way must do, and the way through files.

The ways without files stand in `direct_transport.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.models.weights.hf_writer import write_folder
from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.vllm.client import VllmServer
from megatron_rlt.types import OnProgress

DOING = "weights to vLLM's servers"


_MAX_SHARD_BYTES = 5 * 2**30


class WeightTransport(Protocol):
    """One way of weights to servers."""

    def send(
        self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[VllmServer], lost: set[int], version: int
    ) -> None:
        """Replace the weights of every server, and forget what the old ones cached. Collective over all ranks.

        Every rank exhausts the tensors, also where the transfer fails.

        Args:
            servers: on the first rank; empty on the others.
            lost: there: numbers of servers that must start again before they are asked are added.

        Raises:
            EngineLostError: on every rank: some server may have weights of two versions.
            ValueError: a server was not started for this way.
        """


class FileTransport:
    """Through a Hugging Face folder that every server can read."""

    def __init__(self, policy: Path, folder: Path, on_progress: OnProgress) -> None:
        """
        Args:
            policy: Hugging Face folder whose other files are copied.
            folder: where weights pass through.
        """
        self._policy, self._folder, self._on_progress = policy, folder, on_progress

    def send(
        self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[VllmServer], lost: set[int], version: int
    ) -> None:
        """As `WeightTransport.send`."""
        target = self._folder / f"version-{version}"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            write_folder(tensors, self._policy, target, max_shard_bytes=_MAX_SHARD_BYTES)
        else:
            for _ in tensors:
                pass

        def load() -> None:
            for number, one in enumerate(servers):
                lost.add(number)  # half a sync leaves a server that must not be asked
                one.load_folder(target, version)
                lost.remove(number)

        try:
            on_first_rank(load, world(), self._on_progress, DOING)
        finally:
            if dist.get_rank() == 0:
                shutil.rmtree(target)
