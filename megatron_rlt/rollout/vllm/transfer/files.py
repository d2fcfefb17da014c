"""Weight transport through files: a Hugging Face folder that every server can read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.models.weights.hf_writer import write_folder
from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.vllm.client import ServerClient
from megatron_rlt.rollout.vllm.servers import WeightTransport
from megatron_rlt.types import OnProgress

DOING = "weights to vLLM's servers"
_MAX_SHARD_BYTES = 5 * 2**30


class FileTransport(WeightTransport):
    """Writes the weights of each version to a folder, which every server loads and which is then removed."""

    def __init__(self, policy: Path, folder: Path, on_progress: OnProgress) -> None:
        """`policy`: Hugging Face folder, copied without its weights; `folder`: temporary folders are made in it."""
        self._policy, self._folder, self._on_progress = policy, folder, on_progress

    def send(self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[ServerClient], version: int) -> None:
        """As `WeightTransport.send`."""
        target = self._folder / f"version-{version}"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            write_folder(tensors, self._policy, target, max_shard_bytes=_MAX_SHARD_BYTES)
        else:
            for _ in tensors:
                pass

        def load() -> None:
            for one in servers:
                one.is_lost = True  # half a sync leaves a server that must not be asked
                one.load_folder(target, version)
                one.is_lost = False

        try:
            on_first_rank(load, world(), self._on_progress, DOING)
        finally:
            if dist.get_rank() == 0:
                shutil.rmtree(target)
