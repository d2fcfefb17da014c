"""What rules and plan need to know of a model, without importing the room that reads it.

`models.Architecture` fits these protocols as it is; `config` stands below `models` and never imports it.
"""

from __future__ import annotations

from typing import Any, Protocol


class ModelShape(Protocol):
    """The numbers of a dense decoder's `config.json`."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def rope_scaling(self) -> dict[str, Any] | None: ...
    @property
    def max_positions(self) -> int: ...


def position_limit(shape: ModelShape) -> int:
    """Longest sequence in tokens that the model's position encoding was made for.

    `max_position_embeddings` of a yarn or linearly scaled model is the length before scaling in many published
    folders; llama3's already counts the scaling in.
    """
    scaling = shape.rope_scaling
    if scaling is None or scaling["rope_type"] == "llama3":
        return shape.max_positions
    original = shape.max_positions
    if scaling["rope_type"] == "yarn":
        original = scaling["original_max_position_embeddings"]
    return max(shape.max_positions, int(scaling["factor"] * original))
