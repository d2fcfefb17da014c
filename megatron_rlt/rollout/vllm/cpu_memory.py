"""Shared memory of vLLM's CPU build, through which the ranks of one engine sum their shards.

It gives the segments of every colocated engine one name. So two jobs on one machine would meet, and segments that a
job left behind keep every later one from starting. Here they have a name of this job, and vanish with their last user.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world

_FOLDER = Path("/dev/shm")


@contextmanager
def segments_of_this_job() -> Iterator[None]:
    """Start an engine in the block. Collective over all ranks."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token = broadcast_record(f"megatron-rlt-{secrets.token_hex(6)}", source_rank=0, group=world())
    plain = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:  # noqa: ANN401 - vLLM has no types here
        return token + str(plain(communicator)).lstrip("/")

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
    try:
        yield
        dist.barrier()  # all have mapped them: the names can go
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(plain)
        for segment in _FOLDER.glob(f"{token}*"):
            segment.unlink(missing_ok=True)
