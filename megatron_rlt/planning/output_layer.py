"""Bytes of the output layer, whose logits exist in blocks (`parallel/vocab_logprobs.py`), forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FLOAT32 = 4


@dataclass(frozen=True)
class OutputLayer:
    """One rank's shard of the output layer, and the blocks in which it computes logits."""

    hidden: int
    shard: int  # vocabulary entries of the rank
    row_block: int
    vocab_block: int
    dtype_bytes: int
    gathers: bool  # sequence parallelism: the final hidden states are gathered first
    tp: int

    def forward_bytes(self, tokens: float) -> float:
        """Two float32 copies of a block of logits, the hidden states and the final norm's tensors.

        Args:
            tokens: of one pack on this rank; at most so many rows are wanted.
        """
        return 2 * _FLOAT32 * self._block(tokens) + self._hidden_bytes(tokens)

    def backward_bytes(self, tokens: float) -> float:
        """A block of gradients and its rounded copy, float32 gradients of the block's weights (twice, while they are
        added) and of the hidden states, and the whole shard's gradient in the weights' type."""
        rounded = 0 if self.dtype_bytes == _FLOAT32 else self.dtype_bytes
        block_weight = 2 * _FLOAT32 * min(self.vocab_block, self.shard) * self.hidden
        shard_gradient = self.shard * self.hidden * self.dtype_bytes
        wide_hidden = _FLOAT32 * tokens * self.hidden
        block = (_FLOAT32 + rounded) * self._block(tokens)
        return self._hidden_bytes(tokens) + block + block_weight + shard_gradient + wide_hidden

    def _block(self, tokens: float) -> float:
        return min(self.row_block, tokens) * min(self.vocab_block, self.shard)

    def _hidden_bytes(self, tokens: float) -> float:
        """The last layer's output, the final norm's, and the wanted rows."""
        one = tokens * self.hidden * self.dtype_bytes
        split = self.tp if self.gathers else 1
        return 2 * one / split + one + (one if self.gathers else 0)


def shard_entries(vocab_size: int, tp: int) -> int:
    """Entries of one rank's shard: the vocabulary is padded to a multiple of tp."""
    return math.ceil(vocab_size / tp)
