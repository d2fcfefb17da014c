"""Offloads a frozen model's weights to host memory, pinned if there is a GPU, and onloads them during use.

On a CPU rank the weights move between two buffers, so that tests run both copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron_rlt.models.fp8 import held_tensors


class OffloadedWeights:
    """All parameters and buffers of a module in host memory. Outside of `onload` their device storage has 0 bytes."""

    def __init__(self, module: nn.Module) -> None:
        """Offload at once. The module's tensors own their storage: no gradient buffer or optimizer views them."""
        self._on_device = held_tensors(module)
        for tensor in self._on_device:
            assert not tensor.requires_grad, "the weights of a trained model stay on the device"
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view cannot free its storage"
        self._on_host = [torch.empty_like(one, device="cpu", pin_memory=one.is_cuda) for one in self._on_device]
        self._depth, self._were_onloaded = 0, False
        self._keep()
        self._free()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, wherever they are."""
        return sum(tensor.nbytes for tensor in self._on_host)

    def take_onloaded_bytes(self) -> int:
        """Bytes that were on the device since the previous call (all or none); resets the counter."""
        were_onloaded, self._were_onloaded = self._were_onloaded, self._depth > 0
        return self.num_bytes if were_onloaded else 0

    @contextmanager
    def onload(self, *, changes: bool) -> Iterator[None]:
        """Hold the weights on the device inside this context; contexts nest. Writes are kept only with `changes`."""
        if self._depth == 0:
            self._fetch()
            self._were_onloaded = True
        self._depth += 1
        try:
            yield
        finally:
            if changes:
                self._keep()
            self._depth -= 1
            if self._depth == 0:
                self._free()

    @torch.no_grad()
    def _fetch(self) -> None:
        for tensor, home in zip(self._on_device, self._on_host, strict=True):
            tensor.untyped_storage().resize_(home.nbytes)
            tensor.copy_(home, non_blocking=True)  # later work of the stream waits for the copy

    @torch.no_grad()
    def _keep(self) -> None:
        for tensor, home in zip(self._on_device, self._on_host, strict=True):
            home.copy_(tensor)

    def _free(self) -> None:
        """Free the device storage; safe for running kernels, since the allocator reuses it in stream order."""
        for tensor in self._on_device:
            tensor.untyped_storage().resize_(0)
