"""Reference log-probs from transformers' own model, dense and in fp32 on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_rlt.parallel.platform import device
from megatron_rlt.types import OnProgress, SpannedSequence


@torch.no_grad()
def dense_logprobs(
    folder: Path,
    sequences: Sequence[SpannedSequence],
    *,
    temperature: float,
    on_progress: OnProgress,
    rounded_to: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """`[N_i]` float32 log-probs of each sequence's wanted tokens, on the CPU, in span order. Not collective.

    Loads the model for the call and computes one sequence at a time, with all logits of its wanted tokens at once.
    Weights are rounded to `rounded_to` first.
    """
    disable_progress_bar()  # it would write among the lines of an error
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    round_weights(model, rounded_to)
    model.to(device()).eval()
    found = []
    for number, sequence in enumerate(sequences):
        on_progress(f"sequence {number + 1} of {len(sequences)}")
        positions = sequence.target_positions
        if len(positions) == 0:
            found.append(torch.empty(0))
            continue
        ids = sequence.token_ids.to(device())
        logits = model(ids[None], logits_to_keep=(positions - 1).to(device())).logits[0].float() / temperature
        wanted = logits.log_softmax(-1).gather(1, ids[positions.to(device())][:, None])[:, 0]
        found.append(wanted.cpu())
    return tuple(found)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights to a dtype's values, in their own dtype."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
