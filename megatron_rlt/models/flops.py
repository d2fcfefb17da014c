"""Model FLOP of a call: the floating-point operations of its matrix products, from shapes and lengths.

Independent of layout, packing and kernels; a multiply-add counts 2. Counted: each layer's products per token, attention
over the causal half of each sequence, and the output layer for the wanted rows at the unpadded vocabulary. Not counted:
padding, recomputation, prompts computed twice, norms, softmax and the optimizer; MFU shows those as lost time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.flops import BACKWARD_PASSES, call_flops, causal_pairs
from megatron_rlt.types import SpannedSequence


def forward_flops(architecture: Architecture, lengths: Sequence[int], num_rows: int) -> float:
    """FLOP of one forward pass over sequences of these lengths, with the output layer for `num_rows` tokens."""
    pairs = sum(causal_pairs(length) for length in lengths)
    return call_flops(architecture, num_tokens=sum(lengths), num_pairs=pairs, num_rows=num_rows)


def scoring_flops(architecture: Architecture, sequences: Sequence[SpannedSequence]) -> float:
    """FLOP of one forward pass with the output layer for the wanted tokens."""
    num_rows = sum(sequence.num_targets for sequence in sequences)
    return forward_flops(architecture, [len(sequence) for sequence in sequences], num_rows)


def update_flops(architecture: Architecture, sequences: Sequence[SpannedSequence]) -> float:
    """FLOP of one forward and backward pass."""
    return (1 + BACKWARD_PASSES) * scoring_flops(architecture, sequences)


def decoding_flops(architecture: Architecture, prompt_length: int, completion_lengths: Sequence[int]) -> float:
    """FLOP of sampling completions of one prompt with a KV cache.

    The prompt runs once, with one row of logits for all its completions; a completion's last token never runs.
    """
    continued = [max(length - 1, 0) for length in completion_lengths]
    pairs = causal_pairs(prompt_length)
    pairs += sum(causal_pairs(prompt_length + length) - causal_pairs(prompt_length) for length in continued)
    tokens = prompt_length + sum(continued)
    return call_flops(architecture, num_tokens=tokens, num_pairs=pairs, num_rows=1 + sum(continued))


def sampling_flops(architecture: Architecture, prompts: Sequence[Tensor], completion_lengths: Sequence[int]) -> float:
    """FLOP of sampling one completion per prompt (`[P]` token ids); equal prompts run once."""
    lengths: defaultdict[bytes, list[int]] = defaultdict(list)
    by_ids = {prompt.numpy().tobytes(): prompt for prompt in prompts}
    for prompt, length in zip(prompts, completion_lengths, strict=True):
        lengths[prompt.numpy().tobytes()].append(length)
    return sum(decoding_flops(architecture, len(by_ids[ids]), found) for ids, found in lengths.items())
