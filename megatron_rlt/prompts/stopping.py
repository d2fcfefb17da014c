"""When a completion ends, and where the explanation in it ends: token ids in, positions out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlt.prompts.tokenizer import ChatTokenizer


@dataclass(frozen=True, eq=False)
class StopCondition:
    """Whether the ids sampled so far are a finished completion; cheap enough to ask after every token."""

    tokenizer: ChatTokenizer
    end_tag: str | None  # None: only a stop id ends a completion

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
    text = tokenizer.decode(content)
    start = text.find(end_tag)
    if start < 0:
        return CompletionParts(len(content), has_end_tag=False, text_after_end_tag="")
    # Decoded prefixes grow with the number of ids, so both borders are found by bisection, a dozen decodes.
    counts = range(len(content) + 1)
    num_through_tag = bisect_left(counts, True, key=lambda count: end_tag in tokenizer.decode(content[:count]))
    # The tag's place in the prefix: half a multi-byte character decodes to other lengths than the whole one.
    start = tokenizer.decode(content[:num_through_tag]).find(end_tag)
    num_before_tag = bisect_right(counts, start, key=lambda count: len(tokenizer.decode(content[:count]))) - 1
    after = text[text.find(end_tag) + len(end_tag) :]
    return CompletionParts(num_before_tag, has_end_tag=True, text_after_end_tag=after)
