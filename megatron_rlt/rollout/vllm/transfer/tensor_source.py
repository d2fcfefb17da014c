"""The policy's tensors in the form that vLLM's transfer engines read: metadata first, then one tensor after another.

Has the methods of vLLM's `WeightSource`. Gathering the tensors is collective, so every rank must complete every pass,
even if the transfer fails: `exhaust` reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorMeta:
    """Metadata of one tensor; the fields of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource:
    """Iterates over all policy weights once per sync; names, shapes and dtypes are cached after the first pass."""

    def __init__(self, check: Callable[[], None], on_tensor: Callable[[], None]) -> None:
        """
        Args:
            check: called before each tensor is sent; an exception from it ends the sending, not the pass.
            on_tensor: called for each tensor of every pass.
        """
        self._check, self._on_tensor = check, on_tensor
        self._tensors: Iterable[tuple[str, Tensor]] = ()
        self._pass: Iterator[tuple[str, Tensor]] | None = None
        self._metadata: list[TensorMeta] | None = None
        self.is_broken = False
        """Whether gathering the tensors failed, rather than sending them."""

    def set_source(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Set the tensors of the next pass."""
        self._tensors, self._pass, self.is_broken = tensors, None, False

    def metadata(self) -> list[TensorMeta]:
        """Metadata of every tensor, in order. Collective; the first call makes a pass to learn the shapes."""
        if self._metadata is None:
            self._metadata = [TensorMeta(name, one.dtype, tuple(one.shape)) for name, one in self._one_pass()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._one_pass()
        for item in self._pass:
            self._check()
            yield item

    def exhaust(self) -> None:
        """Read the rest of the pass, or all of it if nobody began."""
        for _ in self._one_pass() if self._pass is None else self._pass:
            pass

    def _one_pass(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for item in self._tensors:
                self._on_tensor()
                yield item
        except Exception:
            self.is_broken = True
            raise
