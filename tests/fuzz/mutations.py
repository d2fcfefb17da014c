"""Mutations of real files: what a broken download, an editor or a hostile hand makes of their bytes and values."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz.outcome import FORGED

FORGING = f"x\nmegatron-rlt: error: {FORGED}\r\x1b[2K\u2028\u202etxt"
DEEP = "[" * 3000 + "]" * 3000

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 10**30, -(10**30), 0.5, -0.5, 1e-30, 1e300, math.nan, math.inf, -math.inf,
    "", "x", "5", FORGING, "\ud800", "\0", "x" * 5000, [], [1], [None], ["x", 2], [[[[]]]], {}, {"a": 1}, {"": None},
)  # fmt: skip


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Content of a file that is cut, garbled, doubled, or in another encoding."""
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    kind = random.randrange(10)
    if kind <= 2:
        return content[:start]
    if kind == 3:
        return content[:start] + bytes(stop - start) + content[stop:]
    if kind == 4:
        return content[:start] + content[stop:]
    if kind == 5:
        return content[:stop] + content[start:]
    if kind == 6:
        return content[:start] + random.randbytes(4) + content[start:]
    if kind == 7:
        place = random.randrange(max(len(content), 1))
        return content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]
    if kind == 8:
        return content.decode("utf-8", errors="replace").encode(random.choice(("utf-16", "utf-8-sig", "utf-7")))
    return random.choice((b"", b"\0" * 64, b"null", b"[]", b"{}", b"\xff\xfe", b"404: Not Found\n", DEEP.encode()))


def mutated_json(content: bytes, random: Random) -> bytes:
    """A JSON file with up to three of its values replaced, moved, or removed."""
    tree = json.loads(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        tree = mutated_value(tree, random)
    return json.dumps(tree).encode()


def mutated_value(tree: Any, random: Random) -> Any:
    """A tree with one value changed, the top seldom."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or random.randrange(20) == 0:
        return random.choice((*VALUES, [tree]))
    # Few keys at the top among thousands of a vocabulary: half of the choices fall on them.
    near = [place for place in places if place[0] is tree]
    holder, key = random.choice(random.choice((places, near)))
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(("x", FORGING, "", "\ud800"))] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3:
        holder[key] = str(holder[key])
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = random.choice((-holder[key], holder[key] * 10**9, holder[key] + 1, float(holder[key])))
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])
