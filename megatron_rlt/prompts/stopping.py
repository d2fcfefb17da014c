"""Finds where a completion ends, and where the explanation in it ends."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlt.prompts.tokenizer import ChatTokenizer

BLOCK_TOKENS = 128  # ids decoded per window when searching the end tag: bisecting whole completions took 10 ms


@dataclass(frozen=True, eq=False)
class StopCondition:
    """Decides whether the ids sampled so far are a finished completion; cheap enough to call after every token."""

    tokenizer: ChatTokenizer
    end_tag: str | None  # None: only a stop id ends a completion

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.tokenizer.stop_ids

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        if not sampled_ids:
            return False
        if sampled_ids[-1] in self.tokenizer.stop_ids:
            return True
        if self.end_tag is None:
            return False
        # Each token adds at least one byte of the tag, and one more token may begin before it.
        tail = sampled_ids[-(len(self.end_tag.encode()) + 1) :]
        return self.end_tag in self.tokenizer.decode(tail)


@dataclass(frozen=True)
class CompletionParts:
    """Split of a completion's ids: `[0, num_explanation_tokens)` is the explanation."""

    num_explanation_tokens: int
    has_end_tag: bool
    text_after_end_tag: str  # up to the final stop id


def split_completion(tokenizer: ChatTokenizer, token_ids: list[int], end_tag: str) -> CompletionParts:
    """Find the explanation: the longest prefix of the ids that lies wholly before the first end tag.

    A token with both text and the beginning of the tag belongs to the tag; separate whitespace tokens before the tag
    stay with the explanation. Without an end tag, the explanation is everything up to the final stop id; a stop id
    elsewhere is content.
    """
    content = token_ids[:-1] if token_ids and token_ids[-1] in tokenizer.stop_ids else token_ids
    reach = len(end_tag.encode())  # each token adds at least one byte of the tag: a window this much earlier has it all
    for block in range(0, len(content), BLOCK_TOKENS):
        first = max(block - reach, 0)
        window = content[first : block + BLOCK_TOKENS]
        if end_tag in tokenizer.decode(window):
            num_before, num_through, rest = _cut_window(tokenizer, window, end_tag)
            after = rest + tokenizer.decode(content[first + num_through :])
            return CompletionParts(first + num_before, has_end_tag=True, text_after_end_tag=after)
    return CompletionParts(len(content), has_end_tag=False, text_after_end_tag="")


def _cut_window(tokenizer: ChatTokenizer, window: list[int], end_tag: str) -> tuple[int, int, str]:
    """Number of tokens before the window's first end tag, number up to its end, and the text that follows the tag.

    Decoded prefixes grow with the number of ids, so bisection finds both borders.
    """
    counts = range(len(window) + 1)
    num_through = bisect_left(counts, True, key=lambda count: end_tag in tokenizer.decode(window[:count]))
    before, _, rest = tokenizer.decode(window[:num_through]).partition(end_tag)
    num_before = bisect_right(counts, len(before), key=lambda count: len(tokenizer.decode(window[:count]))) - 1
    return num_before, num_through, rest
