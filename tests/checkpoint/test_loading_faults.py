"""What fails while a checkpoint is read is called damage only if its content is at fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rlt.checkpoint.torch_format import loading

_FOLDER = Path("step-3")
_OF_MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error"),
    dist.DistBackendError("NCCL error"),
    MemoryError(),
]
_ON_RANKS = [*_OF_MACHINE, OSError(5, "Input/output error")]


def _name(error: Exception) -> str:
    return type(error).__name__


@pytest.mark.parametrize("error", _OF_MACHINE, ids=_name)
def test_a_fault_of_the_machine_is_not_called_damage(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, loading(_FOLDER):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", _ON_RANKS, ids=_name)
def test_nor_is_one_that_torch_gathered_from_the_ranks(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, loading(_FOLDER):
        raise _gathered(error)
    assert raised.value is error


@pytest.mark.parametrize("error", [RuntimeError("a tensor of 3 bytes"), KeyError("weight")], ids=_name)
def test_content_is_called_damaged_in_one_line(error: Exception) -> None:
    for raised_inside in (error, _gathered(error)):
        with pytest.raises(ValueError, match=r"^step-3 is damaged or .* nothing .*was run .*\)$"), loading(_FOLDER):
            raise raised_inside


def _gathered(error: Exception) -> BaseException:
    return CheckpointException("load", {1: (error, [])})  # type: ignore[dict-item]  # its stack is not read
