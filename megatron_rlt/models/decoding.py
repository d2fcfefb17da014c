"""Runs a model with a `KeyValueCache`: chunks of tokens through all pipeline stages, next-token logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.one_token import run_one_token
from megatron_rlt.models.spec import uses_transformer_engine
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.vocab_logprobs import fp32_product

# Attributes by which Megatron's modules and their configuration know of sequence parallelism.
_SEQUENCE_PARALLEL_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def decoding(model: LanguageModel, layout: Layout) -> Iterator[None]:
    """Make `layout` current and the model decode: evaluation mode, no gradients, sequence parallelism off.

    One new token a row cannot be cut into tp parts; the weights are the same either way. Everything is put
    back on the way out.
    """
    was_training = model.training
    owners: list[object] = [model.config, *model.modules()]
    changed = [(owner, flag) for owner in owners for flag in _SEQUENCE_PARALLEL_FLAGS if vars(owner).get(flag) is True]
    for owner, flag in changed:
        setattr(owner, flag, False)
    model.eval()
    try:
        with layout, torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for owner, flag in changed:
            setattr(owner, flag, True)


def cached_forward(
    model: LanguageModel, cache: KeyValueCache, token_ids: Tensor, counts: Tensor, layout: Layout
) -> Tensor | None:
    """Add a chunk of tokens to every row of the cache. Collective over the model's replica, inside `decoding`.

    Args:
        token_ids: `[B, S]` int64, row `b`'s first `counts[b]` are real, the rest padding; the same on every rank.
        counts: `[B]` int64; its largest must be S.

    Returns:
        On the last stage the hidden states `[B, S, H]` (padding rows mean nothing), None on the others.
    """
    cache.begin(counts)
    assert token_ids.shape == cache.positions.shape, "token_ids must be as wide as the largest count"
    token_ids = token_ids.to(cache.positions.device)
    received = None if layout.is_first_stage else _receive(model, layout, token_ids)
    if token_ids.size(1) == 1 and not uses_transformer_engine(model.config.params_dtype):
        output = run_one_token(model, token_ids, received, cache, layout)
    else:
        output = run_chunk(model, token_ids, received, cache)
    cache.commit()
    if layout.is_last_stage:
        return output.transpose(0, 1)
    dist.send(output.contiguous(), dist.get_global_rank(layout.pp_group, layout.pp_rank + 1), group=layout.pp_group)
    return None


def run_chunk(model: LanguageModel, token_ids: Tensor, received: Tensor | None, cache: KeyValueCache) -> Tensor:
    """Run this stage's modules on a chunk `[B, S]`, between the cache's `begin` and `commit`: `[S, B, H]`."""
    if received is not None:
        model.set_input_tensor(received)
    output: Tensor = model(token_ids, cache.positions, cache.mask, inference_context=cache)
    return output


def last_token_logits(model: LanguageModel, hidden: Tensor, counts: Tensor, layout: Layout) -> Tensor:
    """Next-token logits `[B, vocabulary]` fp32 after each row's last real token, whole on every tensor-parallel rank.

    Args:
        hidden: `[B, S, H]` from `cached_forward`. Last stage only.
        counts: `[B]` int64 real tokens of the chunk, each at least 1.
    """
    rows = torch.arange(hidden.size(0), device=hidden.device)
    last = hidden[rows, counts.to(hidden.device) - 1]
    shard = fp32_product(last, model.output_weight().T)  # as in scoring: rounded logits would part the log-probs
    logits: Tensor = gather_from_tensor_model_parallel_region(shard, group=layout.tp_group)
    return logits[:, : model.unpadded_vocab_size]


def _receive(model: LanguageModel, layout: Layout, token_ids: Tensor) -> Tensor:
    """The previous stage's output for a chunk: `[S, B, H]`."""
    shape = (token_ids.size(1), token_ids.size(0), model.config.hidden_size)
    buffer = torch.empty(shape, dtype=model.config.params_dtype, device=token_ids.device)
    dist.recv(buffer, dist.get_global_rank(layout.pp_group, layout.pp_rank - 1), group=layout.pp_group)
    return buffer
