"""Cuts a stream of tensors into buckets; sender and receiver cut alike, so sizes alone need not travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def cut_into_buckets(items: Iterable[T], num_bytes: Callable[[T], int], bucket_bytes: int) -> Iterator[list[T]]:
    """Neighbours that fit together, in order; what is larger than a bucket has one for itself."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        size = num_bytes(item)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket
