"""Keys and values of rows of different lengths, so that they decode together.

An inference context of Megatron's: `CachedSelfAttention` rotates by its positions, stores into it and attends
under its mask. Rows can be dropped, reordered, repeated and joined between chunks. Running a model with it is
`decoding.py`'s job.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor


class KeyValueCache(BaseInferenceContext):  # type: ignore[misc]
    """The cache of this rank's layers and heads.

    Use: `begin(counts)`, one forward pass, `commit()`; and again. Buffers double as rows grow, up to `max_length`.
    """

    def __init__(self, *, num_rows: int, max_length: int, device: torch.device) -> None:
        super().__init__(materialize_only_last_token_logits=False)
        self.max_sequence_length = max_length  # the name Megatron reads to size its RoPE table
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # [B] tokens stored in each row
        self.positions = torch.empty(num_rows, 0, dtype=torch.int64, device=device)  # [B, S] of the current chunk
        self.mask = torch.empty(num_rows, 1, 0, 0, dtype=torch.bool, device=device)  # [B, 1, S, S_key] True: masked
        self._counts = self.lengths
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values: [B, capacity, heads, D]
        self._rotation: tuple[Tensor, Tensor] | None = None

    def is_static_batching(self) -> bool:
        """Megatron: one rectangular batch, handled by `_adjust_key_value_for_inference`."""
        return True

    def is_decode_only(self) -> bool:
        """Megatron: whether flash decoding may be used; never, the mask is ours."""
        return False

    @property
    def num_bytes(self) -> int:
        """Of all buffers, filled or not."""
        return sum(buffer.nbytes for layer in self._buffers.values() for buffer in layer)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.numel())

    def begin(self, counts: Tensor) -> None:
        """Announce a chunk: row `b` brings `counts[b]` tokens, right-padded to the largest count.

        Args:
            counts: `[B]` int64, each at least 0, at least one positive.

        Raises:
            ValueError: a row, its padding included, would grow past `max_length`.
        """
        assert counts.shape == self.lengths.shape, "one count for each row"
        width = int(counts.max())
        reach = int(self.lengths.max()) + width
        if reach > self.max_sequence_length:
            raise ValueError(
                f"a row of {reach} tokens does not fit the cache of {self.max_sequence_length}: raise its max_length"
            )
        self._counts = counts.to(self.lengths)
        self.positions = self.lengths[:, None] + torch.arange(width, device=self.lengths.device)
        slots = torch.arange(reach, device=self.lengths.device)
        self.mask = (slots > self.positions[:, :, None])[:, None]
        self._rotation = None

    def commit(self) -> None:
        """The chunk went through every layer: rows are now longer by their counts.

        Padding was stored too, past each row's end: the mask hides it and the next chunk overwrites it.
        """
        self.lengths = self.lengths + self._counts

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the chunk's positions, `[S, B, 1, D]`; computed by the first layer, kept for the others.

        Args:
            angles: `[max_length, 1, 1, D]`, Megatron's RoPE table.
        """
        if self._rotation is None:
            chosen = angles[self.positions.T, 0]
            self._rotation = (chosen.cos().to(dtype), chosen.sin().to(dtype))
        return self._rotation

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values, `[S, B, heads, D]`; returns all stored so far, `[S_key, B, heads, D]`."""
        keys, values = self._reserve(layer, key)
        rows = torch.arange(self.num_rows, device=key.device)[:, None]
        keys[rows, self.positions] = key.transpose(0, 1)
        values[rows, self.positions] = value.transpose(0, 1)
        reach = self.mask.size(-1)
        return keys[:, :reach].transpose(0, 1), values[:, :reach].transpose(0, 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order: dropping the finished, or repeating a prompt for its group.

        Args:
            rows: `[B_new]` int64 indices of present rows; may repeat.
        """
        rows = rows.to(self.lengths.device)
        self.lengths = self.lengths[rows]
        for layer, (keys, values) in self._buffers.items():
            self._buffers[layer] = (keys[rows], values[rows])

    def extend(self, other: KeyValueCache) -> None:
        """Put the rows of `other`, a cache of the same model, behind this one's; `other` is used up."""
        assert self.max_sequence_length == other.max_sequence_length, "caches of different max_length do not join"
        self.lengths = torch.cat([self.lengths, other.lengths])
        if not self._buffers:
            self._buffers = other._buffers
            return
        for layer, (keys, values) in self._buffers.items():
            more_keys, more_values = other._buffers.pop(layer)
            self._buffers[layer] = (_stack_rows(keys, more_keys), _stack_rows(values, more_values))

    def _reserve(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's buffers, grown to hold the current chunk."""
        needed = self.mask.size(-1)
        stored = self._buffers.get(layer)
        if stored is not None and stored[0].size(1) >= needed:
            return stored
        capacity = needed if stored is None else min(self.max_sequence_length, max(needed, 2 * stored[0].size(1)))
        # Zeros, not garbage: masked slots still meet the softmax's zeros, and 0 * nan is nan.
        shape = (self.num_rows, capacity, *like.shape[2:])
        grown = (like.new_zeros(shape), like.new_zeros(shape))
        if stored is not None:
            for new, old in zip(grown, stored, strict=True):
                new[:, : old.size(1)] = old
        self._buffers[layer] = grown
        return grown


def _stack_rows(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, `[B, capacity, heads, D]`, at the larger capacity; new slots are zero, as in `_reserve`."""
    capacity = max(first.size(1), second.size(1))
    stacked = first.new_zeros(first.size(0) + second.size(0), capacity, *first.shape[2:])
    stacked[: first.size(0), : first.size(1)] = first
    stacked[first.size(0) :, : second.size(1)] = second
    return stacked
