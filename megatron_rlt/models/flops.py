"""How much arithmetic a model call is: the floating-point operations of its matrix products, from shapes and lengths.

Model FLOP: what the mathematics asks for, whatever the layout, the packing and the kernels. A multiplication with its
addition counts 2. Counted: every layer's products for every token, attention over the causal half of each sequence by
itself, and the output layer for the rows that are asked for, at the unpadded vocabulary. Not counted: padding,
recomputed activations and logits, prompts computed twice, norms, softmax and the optimizer. So a share of a machine's
peak shows those as lost time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.types import SpannedSequence

_BACKWARD_PASSES = 2  # every product has two in the backward pass: for its input and for its weight


def forward_flops(architecture: Architecture, lengths: Sequence[int], num_rows: int) -> float:
    """One forward pass over sequences of these lengths, with the output layer for `num_rows` of their tokens."""
    return _flops(architecture, sum(lengths), sum(_causal_pairs(length) for length in lengths), num_rows)


def scoring_flops(architecture: Architecture, sequences: Sequence[SpannedSequence]) -> float:
    """One forward pass with the output layer for the wanted tokens."""
    return forward_flops(
        architecture, [len(sequence) for sequence in sequences], sum(sequence.num_targets for sequence in sequences)
    )


def update_flops(architecture: Architecture, sequences: Sequence[SpannedSequence]) -> float:
    """Forward and backward."""
    return (1 + _BACKWARD_PASSES) * scoring_flops(architecture, sequences)


def decoding_flops(architecture: Architecture, prompt_length: int, completion_lengths: Sequence[int]) -> float:
    """Sampling completions of one prompt with a cache: the prompt runs once, a completion's last token never.

    The output layer runs once after the prompt, for all its completions, and after every token that runs.
    """
    continued = [max(length - 1, 0) for length in completion_lengths]
    pairs = _causal_pairs(prompt_length)
    pairs += sum(_causal_pairs(prompt_length + length) - _causal_pairs(prompt_length) for length in continued)
    return _flops(architecture, prompt_length + sum(continued), pairs, 1 + sum(continued))


def sampling_flops(architecture: Architecture, prompts: Sequence[Tensor], completion_lengths: Sequence[int]) -> float:
    """Sampling completions of many prompts (`[P]` token ids, one a completion): equal prompts run once."""
    lengths: defaultdict[bytes, list[int]] = defaultdict(list)
    by_ids = {prompt.numpy().tobytes(): prompt for prompt in prompts}
    for prompt, length in zip(prompts, completion_lengths, strict=True):
        lengths[prompt.numpy().tobytes()].append(length)
    return sum(decoding_flops(architecture, len(by_ids[ids]), found) for ids, found in lengths.items())


def _causal_pairs(length: int) -> int:
    """Pairs of a query and a key that it may see."""
    return length * (length + 1) // 2


def _flops(architecture: Architecture, num_tokens: int, num_pairs: int, num_rows: int) -> float:
    """
    Args:
        num_pairs: of a query and a key, over all sequences.
        num_rows: tokens whose logits are made.
    """
    heads_size = architecture.num_heads * architecture.head_dim
    key_value_size = 2 * architecture.num_kv_heads * architecture.head_dim
    layer = architecture.hidden_size * (2 * heads_size + key_value_size + 3 * architecture.ffn_size)
    return (
        2.0 * architecture.num_layers * layer * num_tokens
        + 4.0 * architecture.num_layers * heads_size * num_pairs  # scores, then the mean of the values
        + 2.0 * architecture.hidden_size * architecture.vocab_size * num_rows
    )
