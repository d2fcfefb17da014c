"""When a completion ends, and where the explanation in it ends: token ids in, positions out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlt.prompts.tokenizer import ChatTokenizer

BLOCK_TOKENS = 128  # ids decoded at a time in search of the end tag: bisecting whole completions took 10 ms each


@dataclass(frozen=True, eq=False)
class StopCondition:
    """Whether the ids sampled so far are a finished completion; cheap enough to ask after every token."""

    tokenizer: ChatTokenizer
    end_tag: str | None  # None: only a stop id ends a completion

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a completion."""
        return frozenset(self.tokenizer.stop_ids)

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        if not sampled_ids:
            return False
        if sampled_ids[-1] in self.tokenizer.stop_ids:
            return True
        if self.end_tag is None:
            return False
        # A token writes at least one byte of the tag, and one more token may begin before it.
        tail = sampled_ids[-(len(self.end_tag.encode()) + 1) :]
        return self.end_tag in self.tokenizer.decode(tail)


@dataclass(frozen=True)
class CompletionParts:
    """A completion's ids taken apart: `[0, num_explanation_tokens)` is the explanation."""

    num_explanation_tokens: int
    has_end_tag: bool
    text_after_end_tag: str  # up to the final stop id


def split_completion(tokenizer: ChatTokenizer, token_ids: list[int], end_tag: str) -> CompletionParts:
    """Find the explanation: the longest prefix of the ids that lies wholly before the first end tag.

    A token that writes both text and the beginning of the tag belongs to the tag. Whitespace before the tag that
    has tokens of its own stays with the explanation, as it was sampled. Without an end tag the explanation is all
    up to the final stop id; a stop id elsewhere is content.
    """
    content = token_ids[:-1] if token_ids and token_ids[-1] in tokenizer.stop_ids else token_ids
    # A token writes at least one byte of the tag, so a window that begins so many tokens early holds all of it.
    reach = len(end_tag.encode())
    for block in range(0, len(content), BLOCK_TOKENS):
        first = max(block - reach, 0)
        window = content[first : block + BLOCK_TOKENS]
        if end_tag in tokenizer.decode(window):
            num_before, num_through, rest = _cut_window(tokenizer, window, end_tag)
            after = rest + tokenizer.decode(content[first + num_through :])
            return CompletionParts(first + num_before, has_end_tag=True, text_after_end_tag=after)
    return CompletionParts(len(content), has_end_tag=False, text_after_end_tag="")


def _cut_window(tokenizer: ChatTokenizer, window: list[int], end_tag: str) -> tuple[int, int, str]:
    """How many of the window's tokens lie before its first end tag, how many reach to its end, what the last adds.

    Decoded prefixes grow with the number of ids, so both borders are found by bisection.
    """
    counts = range(len(window) + 1)
    num_through = bisect_left(counts, True, key=lambda count: end_tag in tokenizer.decode(window[:count]))
    before, _, rest = tokenizer.decode(window[:num_through]).partition(end_tag)
    num_before = bisect_right(counts, len(before), key=lambda count: len(tokenizer.decode(window[:count]))) - 1
    return num_before, num_through, rest
