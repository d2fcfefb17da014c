"""KV cache of rows of different lengths, so that they decode together.

A Megatron inference context: `CachedSelfAttention` rotates by its positions, stores into it and attends under its mask.
Rows can be dropped, reordered, repeated and appended in place between chunks. `decoding.py` runs models with it.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor


class KeyValueCache(BaseInferenceContext):  # type: ignore[misc]
    """KV cache of this rank's layers and heads. Per chunk: `begin(counts)`, one forward pass, `commit()`.

    Slots are reserved ahead: `capacity` per row at first, doubled up to `max_length` when a row outgrows them, and then
    for the present rows only. `max_length` for all rows would not fit for reasoning models, whose completions are
    seldom that long.
    """

    def __init__(self, *, num_rows: int, max_rows: int, capacity: int, max_length: int, device: torch.device) -> None:
        super().__init__(materialize_only_last_token_logits=False)
        self.max_sequence_length = max_length  # the name Megatron reads to size its RoPE table
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # [B] tokens stored in each row
        self.positions = torch.empty(num_rows, 0, dtype=torch.int64, device=device)  # [B, S] of the current chunk
        self.mask = torch.empty(num_rows, 1, 0, 0, dtype=torch.bool, device=device)  # [B, 1, S, S_key] True: masked
        self._max_rows, self._capacity = max_rows, min(capacity, max_length)
        self._counts = self.lengths
        self._rows = torch.empty(num_rows, 1, dtype=torch.int64, device=device)  # 0, 1, ... while a chunk runs
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values: [max_rows, capacity, heads, D]
        self._rotation: tuple[Tensor, Tensor] | None = None

    def is_static_batching(self) -> bool:
        """True: Megatron then calls `_adjust_key_value_for_inference`."""
        return True

    def is_decode_only(self) -> bool:
        """False: Megatron would use flash decoding, which ignores this cache's mask."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(buffer.nbytes for layer in self._buffers.values() for buffer in layer)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.numel())

    def begin(self, counts: Tensor) -> None:
        """Begin a chunk in which row `b` adds `counts[b]` tokens, right-padded to the largest count.

        Args:
            counts: `[B]` int64, each at least 0, at least one positive.

        Raises:
            ValueError: a row, padding included, would exceed `max_length`.
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
        self._rows = torch.arange(self.num_rows, device=self.lengths.device)[:, None]
        slots = torch.arange(reach, device=self.lengths.device)
        self.mask = (slots > self.positions[:, :, None])[:, None]
        self._rotation = None

    def commit(self) -> None:
        """Add the chunk's counts to the lengths. The mask hides stored padding, which the next chunk overwrites."""
        self.lengths = self.lengths + self._counts

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the chunk's positions, `[S, B, 1, D]`, computed once per chunk.

        `angles` `[max_length, 1, 1, D]` is Megatron's RoPE table.
        """
        if self._rotation is None:
            chosen = angles[self.positions.T, 0]
            self._rotation = (chosen.cos().to(dtype), chosen.sin().to(dtype))
        return self._rotation

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values `[S, B, heads, D]`; returns all stored so far, `[S_key, B, heads, D]`."""
        count, reach = self.num_rows, self.mask.size(-1)
        keys, values = self._reserve(layer, key, num_rows=count, length=reach)
        keys[self._rows, self.positions] = key.transpose(0, 1)
        values[self._rows, self.positions] = value.transpose(0, 1)
        return keys[:count, :reach].transpose(0, 1), values[:count, :reach].transpose(0, 1)

    def keep(self, rows: Tensor) -> None:
        """Keep only `rows` (`[B_new]` int64 indices, may repeat), in this order; only rows that move are copied."""
        rows = rows.to(self.lengths.device)
        moved = (rows != torch.arange(rows.numel(), device=rows.device)).nonzero()[:, 0]
        reach = int(self.lengths.max())
        self.lengths = self.lengths[rows]
        if not moved.numel():
            return
        for layer, (keys, _) in list(self._buffers.items()):
            for buffer in self._reserve(layer, keys, num_rows=rows.numel(), length=reach):
                buffer[moved, :reach] = buffer[rows[moved], :reach]

    def extend(self, other: KeyValueCache, rows: Tensor) -> None:
        """Append copies of `other`'s `rows` (`[B_new]` int64 indices; a prompt's row repeats for its group)."""
        rows = rows.to(self.lengths.device)
        start, stop, reach = self.num_rows, self.num_rows + rows.numel(), int(other.lengths.max())
        self.lengths = torch.cat([self.lengths, other.lengths[rows]])
        for layer, sources in other._buffers.items():
            buffers = self._reserve(layer, sources[0], num_rows=stop, length=reach)
            for buffer, source in zip(buffers, sources, strict=True):
                buffer[start:stop, :reach] = source[rows, :reach]

    def _reserve(self, layer: int, like: Tensor, *, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """This layer's buffers with room for `num_rows` of `length`; shape and dtype as `like` `[..., heads, D]`."""
        stored = self._buffers.get(layer)
        held_rows, held_length = stored[0].shape[:2] if stored is not None else (0, 0)
        if num_rows <= held_rows and length <= held_length:
            return self._buffers[layer]
        if length > held_length:
            doubled = min(self.max_sequence_length, 2 * held_length)
            held_length = max(length, doubled if stored is not None else self._capacity)
        reserved_rows = num_rows if num_rows <= held_rows else max(num_rows, self._max_rows)
        # Zeros: masked slots are multiplied by the softmax's zeros, and 0 * nan is nan.
        shape = (reserved_rows, held_length, *like.shape[2:])
        reserved = like.new_zeros(shape), like.new_zeros(shape)
        for new, old in zip(reserved, stored or (), strict=stored is not None):
            new[: min(num_rows, len(old)), : old.size(1)] = old[:num_rows]
        self._buffers[layer] = reserved
        return reserved
