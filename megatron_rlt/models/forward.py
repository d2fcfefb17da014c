"""Runs a packed batch through one pipeline stage, and computes log-probs from the last stage's output."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.platform import device
from megatron_rlt.parallel.vocab_logprobs import vocab_parallel_logprobs


def run_stage(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Run this rank's stage on a packed batch, inside `with layout:`. Collective over the batch's replica.

    Args:
        model: a `LanguageModel`, or Megatron's DistributedDataParallel around one.

    Returns:
        `[t / tp with sequence parallelism else t, 1, H]`: see `LanguageModel`.
    """
    here = device()
    boundaries = torch.tensor([0, *batch.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(here)
    longest = max(batch.lengths)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if batch.own_rows is not None:
        # Padding counts as tokens: no real token attends to it, and every kernel accepts equal boundaries.
        packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = boundaries
    output: Tensor = model(
        batch.input_ids[None].to(here), batch.position_ids[None].to(here), None, packed_seq_params=packed
    )
    return output


def target_rows(stage_output: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """The hidden states `[R, H]` of wanted rows, the same on every tensor-parallel rank.

    The backward pass sums the gradient over the ranks, since each holds only a shard of the vocabulary.

    Args:
        stage_output: the last stage's `[t / tp or t, 1, H]`.
        rows: `[R]` int64 positions in this rank's part of the pack.
    """
    rows = rows.to(stage_output.device)
    if layout.sp:
        whole = gather_from_sequence_parallel_region(
            stage_output, tensor_parallel_output_grad=True, group=layout.tp_group
        )
        hidden: Tensor = whole[:, 0].index_select(0, rows)
    else:
        hidden = copy_to_tensor_model_parallel_region(stage_output[:, 0].index_select(0, rows), group=layout.tp_group)
    return hidden


def gather_rows(own: Tensor, batch: PackedBatch, layout: Layout) -> Tensor:
    """Gather the values of a rank's own rows `[r, ...]` to all rows `[R, ...]` on every context-parallel rank.

    The backward pass keeps the gradient of each rank's own rows: every rank computes the same from here on.
    """
    if batch.own_rows is None:
        return own
    whole = own.new_zeros(sum(batch.row_counts), *own.shape[1:]).index_copy(0, batch.own_rows.to(own.device), own)
    gathered: Tensor = reduce_from_tensor_model_parallel_region(whole, group=layout.cp_group)
    return gathered


def target_logprobs(
    model: LanguageModel,
    stage_output: Tensor,
    batch: PackedBatch,
    *,
    temperature: float,
    row_block: int | None,
    vocab_block: int | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of a batch's targets and the entropy of their distributions, both `[R]` fp32. Last stage only.

    Log-probs are differentiable in the stage's output and the output weight; see `parallel.vocab_logprobs`.
    """
    layout = model.layout
    hidden = target_rows(stage_output, batch.rows, layout)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        model.output_weight(),
        batch.targets.to(hidden.device),
        temperature=temperature,
        vocab_size=model.unpadded_vocab_size,
        tp_group=layout.tp_group,
        row_block=row_block,
        vocab_block=vocab_block,
    )
    return gather_rows(logprobs, batch, layout), gather_rows(entropy, batch, layout)
