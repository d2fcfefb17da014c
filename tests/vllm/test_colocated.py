"""vLLM in a policy's own ranks: its completions and log-probs through several weight syncs, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.config.models import LayoutConfig
from tests.ranks import run_ranks
from tests.vllm.policies import Case, colocated, save_policy
from tests.vllm.versions import Sampled, check_versions, dense_policy, sample_versions

CASES = (
    Case("tp2 sp", LayoutConfig(tp=2, sp=True), "qwen2", tied=False, tp=2),
    Case("pp2, two engines", LayoutConfig(pp=2), "qwen3", tied=True, tp=1),
    Case("dp2, one engine", LayoutConfig(), "llama", tied=False, tp=2, temperature=1.0, top_p=0.8),
    Case("few ids", LayoutConfig(tp=2), "qwen3", tied=False, tp=1, num_ids=300),
    Case("cp2, tied", LayoutConfig(cp=2), "qwen2", tied=True, tp=2),
)


def sample_beside(folder: Path, case: Case) -> tuple[Sampled, int]:
    beside = colocated(folder, case)
    return sample_versions(beside, case, (3, 4, 5)), beside.engine.take_peak_cache_bytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_colocated_completions_are_the_policys_after_every_weight_sync(case: Case, tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", case)
    (found, cache_bytes), (other, _) = run_ranks(sample_beside, 2, folder, case)
    check_versions(dense_policy(folder), case, found, other)
    assert cache_bytes > 0
