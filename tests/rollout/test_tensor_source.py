"""Every pass comes to its end, however the sending ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.transfer.tensor_source import TensorMeta, TensorSource


class Weights:
    """Three tensors, counted as they are made."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.num_made, self._fails_at = 0, fails_at

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for number in range(3):
            if number == self._fails_at:
                raise RuntimeError("no memory")
            self.num_made += 1
            yield f"weight{number}", torch.zeros(number + 1, 2, dtype=torch.bfloat16)


def lose() -> None:
    raise EngineLostError("gone")


def test_metadata_is_recorded_once() -> None:
    source, weights = TensorSource(lambda: None, lambda: None), Weights()
    source.set_source(weights)
    assert source.metadata()[1] == TensorMeta("weight1", torch.bfloat16, (2, 2))
    assert source.metadata()[1].num_bytes == 8
    assert weights.num_made == 3


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_what_nobody_read_is_exhausted(num_taken: int) -> None:
    source, weights = TensorSource(lambda: None, lambda: None), Weights()
    source.set_source(weights)
    if num_taken > 0:
        for number, _ in enumerate(source, 1):
            if number == num_taken:
                break
    source.exhaust()
    assert weights.num_made == 3


def test_a_lost_server_ends_the_sending_but_not_the_pass() -> None:
    source, weights = TensorSource(lose, lambda: None), Weights()
    source.set_source(weights)
    with pytest.raises(EngineLostError):
        next(iter(source))
    assert not source.is_broken
    source.exhaust()
    assert weights.num_made == 3


def test_tensors_that_fail_by_themselves_are_told_from_servers_that_do() -> None:
    source = TensorSource(lambda: None, lambda: None)
    source.set_source(Weights(fails_at=1))
    with pytest.raises(RuntimeError, match="no memory"):
        list(source)
    assert source.is_broken
