"""Where a completion of vLLM's ends is this project's decision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.types import FinishReason


class Letters:
    """Ids are letters of the alphabet; "xyz" or the id 0 ends a completion."""

    stop_ids = (0,)
    end_tag = "xyz"

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        return sampled_ids[-1] == 0 or "xyz" in "".join(chr(96 + one) for one in sampled_ids)


SAMPLING = Sampling(1.0, 1.0, 27, 27, 8, Letters())


@pytest.mark.parametrize(
    ("ids", "told", "length", "reason"),
    [
        ([1, 2, 24, 25, 26], "stop", 5, FinishReason.STOP),
        ([1, 24, 25, 26, 5, 6], "stop", 4, FinishReason.STOP),  # vLLM's text showed the tag two tokens late
        ([1, 2, 0], "stop", 3, FinishReason.STOP),
        ([1, 2, 3, 4, 5, 24, 25, 26], "length", 8, FinishReason.STOP),  # the last token that fits ends it, too
        ([1, 2, 3, 4, 5, 6, 7, 8], "length", 8, FinishReason.LENGTH),
    ],
)
def test_ids_are_kept_up_to_the_token_that_ends_them(
    ids: list[int], told: str, length: int, reason: FinishReason
) -> None:
    assert SAMPLING.cut(ids, told) == (length, reason)


def test_an_end_that_only_vllm_sees_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"after 3 tokens \(stop\)"):
        SAMPLING.cut([1, 2, 3], "stop")
