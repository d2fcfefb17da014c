"""Bytes of activations per token: what one layer saves for the backward pass, and what it needs for a moment.

Counted tensor by tensor, as the layers save them. Two kinds of layers exist (`models/spec.py`): Transformer Engine's,
in bfloat16 on GPUs, and the local ones, on CPUs and in float32. Parts of a layer between two products are whole on
every tensor-parallel rank, unless sequence parallelism splits them; the parts inside are always split.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerForm:
    """The sizes of one decoder layer that decide what it saves."""

    hidden: int
    query: int  # heads x head size
    key: int  # key-value heads x head size
    ffn: int
    head_dim: int
    is_gated: bool = True  # SwiGLU; else one product before the activation function
    is_rotary: bool = True  # else positions are added to the embedding
    has_head_norms: bool = False
    has_dropout: bool = False

    @classmethod
    def of(cls, shape: Architecture) -> LayerForm:
        return cls(
            hidden=shape.hidden_size,
            query=shape.num_heads * shape.head_dim,
            key=shape.num_kv_heads * shape.head_dim,
            ffn=shape.ffn_size,
            head_dim=shape.head_dim,
            has_head_norms=shape.qk_norm,
        )


@dataclass(frozen=True)
class Split:
    """Into how many parts a layer's tensors are split over tensor-parallel ranks."""

    inside: int
    between: int

    @classmethod
    def of(cls, layout: LayoutConfig) -> Split:
        return cls(layout.tp, layout.tp if layout.sp else 1)


def saved_per_token(form: LayerForm, split: Split, *, dtype_bytes: int, is_fused: bool) -> float:
    """Bytes of one layer that stay until its backward pass, per token of the rank.

    Args:
        is_fused: Transformer Engine's layers with flash attention.
    """
    count = _fused_saved if is_fused else _local_saved
    between, inside = count(form, dtype_bytes)
    return between / split.between + inside / split.inside


def _fused_saved(form: LayerForm, width: int) -> tuple[float, float]:
    """Between and inside the products, in bytes. GPT without grouped queries: 10 h and 24 h, as in arXiv 2205.05198."""
    norms_and_inputs = 2 * 2 * form.hidden * width
    masks = 2 * form.hidden if form.has_dropout else 0  # one byte per entry
    attention = 2 * form.query + 2 * form.key  # query, key, value, output
    if form.is_rotary:
        attention += form.query + form.key  # the value is a view of the product, which query and key left rotated
    if form.has_head_norms:
        attention += form.query + form.key  # normed, before they are rotated
    feed_forward = _fused_products(form) * form.ffn
    return norms_and_inputs + masks, (attention + feed_forward) * width


def _fused_products(form: LayerForm) -> int:
    """Tensors of the feed-forward size: what the activation function reads, two halves if gated, and its result."""
    return 3 if form.is_gated else 2


def _local_saved(form: LayerForm, width: int) -> tuple[float, float]:
    wide_input = 0 if width == _FLOAT32 else _FLOAT32  # a float32 copy of what is float32 already is none
    norm = form.hidden * (2 * width + width + wide_input)  # input, normed, times the weight
    rotation = 2 * 2 * form.head_dim * width  # cosine and sine of query and key, on every rank whole
    heads = form.query + form.key
    attention = (
        (form.query + 2 * form.key) + heads + 2 * form.query
    )  # product, rotated, outputs per sequence and joined
    head_norms = 2 * form.query + form.key if form.has_head_norms else 0
    feed_forward = 5 * form.ffn  # product of both halves, silu, the linear half plus its offset, their product
    return 2 * norm + rotation, (attention + head_norms + feed_forward) * width


def passing_per_token(form: LayerForm, split: Split, *, dtype_bytes: int, is_fused: bool) -> float:
    """Bytes of the fullest moment of one layer of which nothing is kept, per token of the rank.

    It is the feed-forward part: the residual, the norm's output (gathered where it was split), and the products.
    """
    products = (_fused_products(form) if is_fused else 5) * form.ffn
    gathered = form.hidden if split.between > 1 else 0
    return dtype_bytes * (2 * form.hidden / split.between + gathered + products / split.inside)


def backward_per_token(form: LayerForm, split: Split, *, dtype_bytes: int, is_fused: bool) -> float:
    """Bytes of gradients at the fullest moment of one layer's backward pass, per token of the rank."""
    products = (_fused_products(form) if is_fused else 4) * form.ffn
    gathered = 2 * form.hidden if split.between > 1 else 0  # the product's input again, and its gradient
    return dtype_bytes * (2 * form.hidden / split.between + gathered + products / split.inside)


@dataclass(frozen=True)
class Stage:
    """One rank's part of a model's pass over packs."""

    num_layers: int
    is_first: bool
    is_last: bool
    in_flight: int  # packs whose backward pass is still to come, at the fullest moment

    @classmethod
    def of(cls, shape: Architecture, layout: LayoutConfig, *, stage: int, num_packs: int) -> Stage:
        """One forward, one backward: stage s of p holds p - s packs."""
        return cls(
            num_layers=shape.num_layers // layout.pp,
            is_first=stage == 0,
            is_last=stage == layout.pp - 1,
            in_flight=max(1, min(layout.pp - stage, num_packs)),
        )


def training_bytes(
    form: LayerForm,
    split: Split,
    stage: Stage,
    *,
    tokens: float,
    recompute: str,
    output_bytes: float,
    dtype_bytes: int,
    is_fused: bool,
) -> float:
    """Activations of a rank at the fullest moment of forward and backward passes.

    The output layer's memory is free again before the last layer's backward pass begins, so the larger counts.

    Args:
        tokens: of one pack on this rank.
        recompute: "full" keeps each layer's input alone. Flash attention saves no scores, so "selective" saves no more
            than "none" leaves.
        output_bytes: of the output layer and what follows it; 0 on stages without one.
    """
    saved = saved_per_token(form, split, dtype_bytes=dtype_bytes, is_fused=is_fused)
    backward = backward_per_token(form, split, dtype_bytes=dtype_bytes, is_fused=is_fused)
    layer_input = form.hidden * dtype_bytes / split.between
    kept = layer_input if recompute == "full" else saved
    again = saved if recompute == "full" else 0.0
    moment = max(output_bytes, tokens * (again + backward))
    return stage.in_flight * stage.num_layers * kept * tokens + moment
