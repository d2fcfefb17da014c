"""The process group of a job of one rank. It opens no port; gloo listens for peers even where there are none.

torch's group without communication copies inputs to outputs and returns at once, which for a single rank is what every
collective does. `tests/parallel/test_single_rank.py` compares all collectives with gloo's.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup, HashStore, Store

_BACKEND = "single_rank"


def start_single_rank(timeout: timedelta) -> None:
    """Start the job's process group of this rank alone."""
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, _group, devices=["cpu"])
    dist.init_process_group(_BACKEND, store=HashStore(), rank=0, world_size=1, timeout=timeout)


def _group(_store: Store, rank: int, world_size: int, _timeout: timedelta) -> FakeProcessGroup:
    assert world_size == 1, "groups of one rank have no peers"
    return FakeProcessGroup._create_internal(rank, world_size)
