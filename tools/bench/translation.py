"""What the CPU platform (`megatron_rlt/parallel/cpu.py`) costs within a call."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable

import megatron_rlt.parallel.cpu


def translation_share(call: Callable[[], object]) -> float:
    """Share of a call's processor time in functions of `parallel/cpu.py`, constructors they call included.

    Under a profiler, which makes small functions look dearer: an upper bound.
    """
    profile = cProfile.Profile(time.process_time, builtins=False)
    profile.runcall(call)
    stats = pstats.Stats(profile)
    own = {place[0]: 0.0 for place in stats.stats}  # type: ignore[attr-defined]  # pstats has no types for it
    for (file, _, _), (_, _, own_seconds, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        own[file] += own_seconds
    return own.get(megatron_rlt.parallel.cpu.__file__, 0.0) / sum(own.values())
