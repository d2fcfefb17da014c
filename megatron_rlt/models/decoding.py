"""Runs chunks of tokens through all pipeline stages with a `KeyValueCache` and returns next-token logits."""

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
from megatron_rlt.parallel.vocab_logprobs import matmul_fp32

# Attributes of Megatron's modules and their configuration that turn on sequence parallelism.
_SEQUENCE_PARALLEL_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def decoding(model: LanguageModel) -> Iterator[None]:
    """Enter the model's layout in evaluation mode, without gradients and sequence parallelism; restored afterwards.

    Sequence parallelism cannot split one new token per row into tp parts; the weights are the same either way.
    """
    was_training = model.training
    owners: list[object] = [model.config, *model.modules()]
    changed = [(owner, flag) for owner in owners for flag in _SEQUENCE_PARALLEL_FLAGS if vars(owner).get(flag) is True]
    for owner, flag in changed:
        setattr(owner, flag, False)
    model.eval()
    try:
        with model.layout, torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for owner, flag in changed:
            setattr(owner, flag, True)


def cached_forward(model: LanguageModel, cache: KeyValueCache, token_ids: Tensor, counts: Tensor) -> Tensor | None:
    """Add a chunk of tokens to every row of the cache. Collective over the model's replica, inside `decoding`.

    Args:
        token_ids: `[B, S]` int64, right-padded: row `b` has `counts[b]` tokens; the same on every rank.
        counts: `[B]` int64; its largest must be S.

    Returns:
        On the last stage the hidden states `[B, S, H]` (undefined at padding), None on the others.
    """
    layout = model.layout
    cache.begin(counts)
    assert token_ids.shape == cache.positions.shape, "token_ids must be as wide as the largest count"
    token_ids = token_ids.to(cache.positions.device)
    received = None if layout.is_first_stage else _receive(model, token_ids)
    if token_ids.size(1) == 1 and not uses_transformer_engine(model.config.params_dtype):
        output = run_one_token(model, token_ids, received, cache)
    else:
        output = run_chunk(model, token_ids, received, cache)
    cache.commit()
    if layout.is_last_stage:
        return output.transpose(0, 1)
    dist.send(output.contiguous(), dist.get_global_rank(layout.pp_group, layout.pp_rank + 1), group=layout.pp_group)
    return None


def run_chunk(model: LanguageModel, token_ids: Tensor, received: Tensor | None, cache: KeyValueCache) -> Tensor:
    """Run this stage on a chunk `[B, S]` between the cache's `begin` and `commit`. Returns `[S, B, H]`."""
    if received is not None:
        model.set_input_tensor(received)
    output: Tensor = model(token_ids, cache.positions, cache.mask, inference_context=cache)
    return output


def last_token_logits(model: LanguageModel, hidden: Tensor, counts: Tensor) -> Tensor:
    """Next-token logits `[B, V]` fp32 after each row's last real token, gathered on every tensor-parallel rank.

    Args:
        hidden: `[B, S, H]` from `cached_forward`. Last stage only.
        counts: `[B]` int64 real tokens of the chunk, each at least 1.
    """
    rows = torch.arange(hidden.size(0), device=hidden.device)
    last = hidden[rows, counts.to(hidden.device) - 1]
    shard = matmul_fp32(last, model.output_weight().T)  # fp32, as in scoring: bf16 logits would change the log-probs
    logits: Tensor = gather_from_tensor_model_parallel_region(shard, group=model.layout.tp_group)
    return logits[:, : model.unpadded_vocab_size]


def _receive(model: LanguageModel, token_ids: Tensor) -> Tensor:
    """The previous stage's output for a chunk: `[S, B, H]`."""
    layout, shape = model.layout, (*token_ids.T.shape, model.config.hidden_size)
    buffer = torch.empty(shape, dtype=model.config.params_dtype, device=token_ids.device)
    dist.recv(buffer, dist.get_global_rank(layout.pp_group, layout.pp_rank - 1), group=layout.pp_group)
    return buffer
