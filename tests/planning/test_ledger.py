"""The plan of a configuration against the memory ledger of ranks that run it; `tools/bench/plan.py` has 15 cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tools.bench.plan_ranks import Case, measure, model_folder

_SMALL = {"num_sequences": 8, "layers": 4, "max_tokens_per_pack": 1024, "completion": 16, "prompt": 240}


@pytest.mark.parametrize(
    "case",
    [
        Case("recomputed and offloaded", 1, {"recompute": "full"}, {"offload": True}, **_SMALL),
        Case("tp 2, sp beside dp 2", 2, {"layout": {"tp": 2, "sp": True}}, {}, **_SMALL),
        Case("pp 2 beside cp 2", 2, {"layout": {"pp": 2}}, {"layout": {"cp": 2}}, **_SMALL),
    ],
    ids=lambda case: case.name,
)
def test_every_phase_needs_what_the_plan_says(case: Case, tmp_path: Path) -> None:
    """Within 10 % or, where weights are small, 8 MiB: a tenth of what a phase holds here."""
    found = run_ranks(measure, case.num_ranks, case, model_folder(case, tmp_path))
    for rank in found:
        assert [one.phase for one in rank] == ["rollout", "student", "old_policy", "reference", "update"]
        for one in rank:
            assert one.planned == pytest.approx(one.measured, rel=0.1, abs=8 * 2**20), one.phase
