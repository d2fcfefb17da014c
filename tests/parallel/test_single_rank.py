"""One rank's collectives, each compared with what gloo makes of the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.parallel.single_rank import start_single_rank
from tests.ranks import forkserver
from tools.chaos.sockets import listening_sockets

_OTHER = torch.arange(6.0).view(2, 3)


def _all_reduce(tensor: Tensor) -> list[Tensor]:
    dist.all_reduce(tensor)
    return [tensor]


def _all_reduce_later(tensor: Tensor) -> list[Tensor]:
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
    assert work is not None
    work.wait()
    return [tensor]


def _reduce(tensor: Tensor) -> list[Tensor]:
    dist.reduce(tensor, 0)
    return [tensor]


def _broadcast(tensor: Tensor) -> list[Tensor]:
    dist.broadcast(tensor, 0)
    return [tensor]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.zeros_like(tensor)]
    dist.all_gather(found, tensor)
    return found


def _all_gather_into(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.all_gather_into_tensor(found, tensor)
    return [found]


def _gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.zeros_like(tensor)]
    dist.gather(tensor, found)
    return found


def _scatter(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.scatter(found, [tensor])
    return [found]


def _reduce_scatter(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.reduce_scatter(found, [tensor])
    return [found]


def _reduce_scatter_tensor(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.reduce_scatter_tensor(found, tensor)
    return [found]


def _all_to_all(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.all_to_all_single(found, tensor)
    return [found]


def _all_to_all_split(tensor: Tensor) -> list[Tensor]:
    found = torch.zeros_like(tensor)
    dist.all_to_all_single(found, tensor, [2], [2])
    return [found]


def _objects(_: Tensor) -> list[Tensor]:
    told: list[object] = [None]
    dist.all_gather_object(told, {"a": 1})
    sent: list[object] = [(2, "b")]
    dist.broadcast_object_list(sent, src=0)
    gathered: list[object] = [None]
    dist.gather_object([3], gathered, dst=0)
    scattered: list[object] = [None]
    dist.scatter_object_list(scattered, ["c"], src=0)
    assert (told, sent, gathered, scattered) == ([{"a": 1}], [(2, "b")], [[3]], ["c"])
    dist.barrier()
    return []


COLLECTIVES: tuple[Callable[[Tensor], list[Tensor]], ...] = (
    _all_reduce,
    _all_reduce_later,
    _reduce,
    _broadcast,
    _all_gather,
    _all_gather_into,
    _gather,
    _scatter,
    _reduce_scatter,
    _reduce_scatter_tensor,
    _all_to_all,
    _all_to_all_split,
    _objects,
)


def _call_all() -> list[list[Tensor]]:
    return [collective(_OTHER.clone()) for collective in COLLECTIVES]


def _compare() -> None:
    start_single_rank(timedelta(seconds=60))
    found = _call_all()
    subgroup = dist.new_group([0])
    assert (subgroup.size(), subgroup.rank()) == (1, 0)
    assert listening_sockets() == []
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert len(listening_sockets()) == 1, "the test can see gloo's"
    expected = _call_all()
    for collective, ours, gloos in zip(COLLECTIVES, found, expected, strict=True):
        assert len(ours) == len(gloos), collective
        assert all(map(torch.equal, ours, gloos)), collective


def test_every_collective_of_one_rank_does_what_gloos_does_without_a_port() -> None:
    process = forkserver().Process(target=_compare)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_it_refuses_to_stand_for_several_ranks() -> None:
    from megatron_rlt.parallel.single_rank import _group

    with pytest.raises(AssertionError, match="no peers"):
        _group(dist.HashStore(), 0, 2, timedelta(seconds=1))
