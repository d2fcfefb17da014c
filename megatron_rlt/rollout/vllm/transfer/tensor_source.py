"""The policy's tensors as vLLM's transfer engines take them: told in advance, then one after another.

Has the shape of vLLM's `WeightSource`. Making the tensors is collective, so every rank must take part in every passage
to its end, whatever becomes of the transfer: `drain` takes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorMeta:
    """What one tensor of a passage will be; the fields of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource:
    """Passages of all weights, one each sync; which tensors they bring is recorded once."""

    def __init__(self, check: Callable[[], None], on_tensor: Callable[[], None]) -> None:
        """
        Args:
            check: called before each tensor goes out; what it raises ends the sending, not the passage.
            on_tensor: called for each tensor of every passage.
        """
        self._check, self._on_tensor = check, on_tensor
        self._tensors: Iterable[tuple[str, Tensor]] = ()
        self._passage: Iterator[tuple[str, Tensor]] | None = None
        self._metadata: list[TensorMeta] | None = None
        self.is_broken = False
        """Whether the tensors themselves failed, not who took them."""

    def follow(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The next passage is of these."""
        self._tensors, self._passage, self.is_broken = tensors, None, False

    def metadata(self) -> list[TensorMeta]:
        """Of every tensor, in order. Collective, and at first a passage of its own: shapes are not known before."""
        if self._metadata is None:
            passage = self._one_passage()
            self._metadata = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in passage]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._passage = self._one_passage()
        for item in self._passage:
            self._check()
            yield item

    def drain(self) -> None:
        """Take what is left of the passage, all of it if nobody began."""
        for _ in self._one_passage() if self._passage is None else self._passage:
            pass

    def _one_passage(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for item in self._tensors:
                self._on_tensor()
                yield item
        except Exception:
            self.is_broken = True
            raise


# Cuts a stream of tensors into buckets; sender and receiver cut alike, so sizes alone need not travel.
T = TypeVar("T")


def cut_into_buckets(items: Iterable[T], num_bytes: Callable[[T], int], bucket_bytes: int) -> Iterator[list[T]]:
    """Neighbours that fit together, in order; what is larger than a bucket has one for itself."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        size = num_bytes(item)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket
