"""Where a frozen model's weights live: on the device, or on the host between the model's turns.

A turn is the time in which the model is asked. On the host the weights lie in pinned memory, if there is a GPU; on a
CPU rank they move between two buffers of the same memory, so that both sides of the move are real in every test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HostWeights:
    """All parameters and buffers of a module, parked on the host. Outside of turns their device storage has 0 bytes."""

    def __init__(self, module: nn.Module) -> None:
        """Park the weights at once.

        Args:
            module: its tensors own their storage: no gradient buffer or optimizer holds views of them.
        """
        # Parameters that are tied, or named twice, are one tensor.
        self._on_device = list(dict.fromkeys((*module.parameters(), *module.buffers())))
        for tensor in self._on_device:
            assert not tensor.requires_grad, "the weights of a model that is trained stay on the device"
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view's storage is not its own to free"
        self._on_host = [
            torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in self._on_device
        ]
        self._depth = 0
        self._had_turn = False
        self._keep()
        self._free()

    @property
    def num_bytes(self) -> int:
        """Of all weights, wherever they are."""
        return sum(tensor.nbytes for tensor in self._on_host)

    @property
    def are_away(self) -> bool:
        """Whether the device holds nothing of them."""
        return self._depth == 0

    def take_visiting_bytes(self) -> int:
        """Bytes that were on the device since the last call: all of them, or none."""
        had_turn, self._had_turn = self._had_turn, not self.are_away
        return self.num_bytes if had_turn else 0

    @contextmanager
    def turn(self, *, changes: bool) -> Iterator[None]:
        """The weights on the device; turns nest.

        Args:
            changes: they are written in this turn, and what was written is kept. Without it, it is lost.
        """
        if self._depth == 0:
            self._fetch()
            self._had_turn = True
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
            tensor.copy_(home, non_blocking=True)  # what runs next on the stream waits for it

    @torch.no_grad()
    def _keep(self) -> None:
        for tensor, home in zip(self._on_device, self._on_host, strict=True):
            home.copy_(tensor)

    def _free(self) -> None:
        """The allocator hands the memory to later work of the same stream only, so running kernels still find it."""
        for tensor in self._on_device:
            tensor.untyped_storage().resize_(0)
