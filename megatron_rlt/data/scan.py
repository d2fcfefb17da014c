"""All rows of a prepared folder once, in order: for checks that must see every row before a model loads."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from megatron_rlt.data.shards import problem_from_json, read_manifest
from megatron_rlt.types import Problem


def scan_problems(folder: Path, *, part: int, num_parts: int) -> Iterator[Problem]:
    """Every `num_parts`-th row, from row `part` on, so that ranks can share the reading.

    Raises ValueError as `read_manifest` does.
    """
    number = 0
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, f"{shard.name}: {member.name} is not a file"
                if number % num_parts == part:
                    yield problem_from_json(file.read())
                number += 1
