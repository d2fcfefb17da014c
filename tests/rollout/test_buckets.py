"""Where a stream of tensors is cut."""

from __future__ import annotations

import pytest

from megatron_rlt.rollout.vllm.transfer.tensor_source import cut_into_buckets


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([4, 6, 1], [[4, 6], [1]]),  # exactly full
        ([4, 7, 3], [[4], [7, 3]]),
        ([1, 25, 1, 1], [[1], [25], [1, 1]]),  # larger than a bucket
        ([25, 25], [[25], [25]]),
    ],
)
def test_neighbours_that_fit_go_together_and_what_is_too_large_alone(
    sizes: list[int], buckets: list[list[int]]
) -> None:
    assert list(cut_into_buckets(sizes, lambda size: size, 10)) == buckets
