"""The correction in real steps with an engine whose log-probs are off by known noise; the loss is counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.jobs.rl.grpo import update_metrics
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.types import Completion
from tests.distributed.tiny_runs import TinyInputs, tiny_inputs
from tests.jobs.tiny_steps import tiny_steps
from tests.ranks import run_ranks

CAP, TOKEN_MIN, SEQUENCE_MIN = 1.1, 0.8, 0.99
CASES = {
    "off": [],
    "token": [f"mismatch.token_weight_cap={CAP}"],
    "sequence": [f"mismatch.sequence_weight_cap={CAP}"],
    "masks": [f"mismatch.token_ratio_min={TOKEN_MIN}", f"mismatch.sequence_ratio_min={SEQUENCE_MIN}"],
    "idle masks": ["mismatch.token_ratio_min=0.01", "mismatch.sequence_ratio_max=100"],
}


class NoisyEngine:
    """The real engine, whose log-probs are off by noise that depends on the completion's seed alone."""

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        self.model_flops = engine.model_flops

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        return [_noisy(completion) for completion in self._engine.generate(requests, policy_version)]


def _noisy(completion: Completion) -> Completion:
    generator = torch.Generator().manual_seed(completion.seed)
    noise = torch.randn(len(completion.token_ids), generator=generator)
    return replace(completion, rollout_logprobs=completion.rollout_logprobs + 0.3 * noise)


def _steps(inputs: TinyInputs, folder: Path) -> dict[str, dict[str, Any]]:
    """What the first step of each case did, and all it was made from."""
    found = {}
    for name, settings in CASES.items():
        steps = tiny_steps(inputs, folder / name, "grpo.reference=null", *settings)
        noisy: Any = NoisyEngine(steps.context.rollout)
        steps = replace(steps, context=replace(steps.context, rollout=noisy))
        result = steps.take(0)
        found[name] = {
            "ratios": [
                (one.old_logprobs.double() - one.completion.rollout_logprobs.double()).exp()
                for one in result.completions
            ],
            "advantages": torch.tensor([one.advantage for one in result.completions], dtype=torch.float64),
            "valid": torch.tensor([one.combined.dropped is None for one in result.completions]),
            "update": update_metrics(result.updates),
            "correction": steps.context.learner.mismatch.metrics(result.completions),
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    inputs = tiny_inputs(tmp_path_factory.mktemp("correction"), num_rows=8)
    by_case: dict[str, dict[str, Any]] = run_ranks(_steps, 1, inputs, tmp_path_factory.mktemp("run"))[0]
    return by_case


def _loss(case: dict[str, Any], weights: list[torch.Tensor], kept: torch.Tensor) -> float:
    """`-1/N sum_i A_i 1/C_i sum_t weight_it` over the N kept completions: the ratio of the only update is 1."""
    terms = [-advantage * weight.mean() for advantage, weight in zip(case["advantages"], weights, strict=True)]
    return float(torch.stack(terms)[kept].sum() / kept.sum())


def test_without_settings_a_mismatch_changes_nothing(found: dict[str, dict[str, Any]]) -> None:
    case = found["off"]
    ratios = torch.cat(case["ratios"])
    assert float(ratios.min()) < TOKEN_MIN < CAP < float(ratios.max())
    ones = [torch.ones_like(ratio) for ratio in case["ratios"]]
    assert case["update"]["loss"] == pytest.approx(_loss(case, ones, case["valid"]), abs=1e-6)
    assert case["correction"] == {}


def test_token_weights_enter_the_loss(found: dict[str, dict[str, Any]]) -> None:
    case = found["token"]
    weights = [ratio.clamp(max=CAP) for ratio in case["ratios"]]
    assert case["update"]["loss"] == pytest.approx(_loss(case, weights, case["valid"]), abs=1e-6)
    assert case["update"]["loss"] != pytest.approx(found["off"]["update"]["loss"], abs=1e-3)
    assert case["correction"] == pytest.approx(
        {
            "rollout_weight_mean": float(torch.cat(weights).mean()),
            "rollout_weight_capped_share": float((torch.cat(case["ratios"]) > CAP).double().mean()),
        }
    )


def test_sequence_weights_enter_the_loss(found: dict[str, dict[str, Any]]) -> None:
    case = found["sequence"]
    weights = [ratio.prod().clamp(max=CAP).expand(len(ratio)) for ratio in case["ratios"]]
    assert case["update"]["loss"] == pytest.approx(_loss(case, weights, case["valid"]), abs=1e-6)
    assert case["correction"]["rollout_weight_mean"] == pytest.approx(float(torch.cat(weights).mean()))


def test_masked_tokens_lose_their_weight_and_masked_completions_their_place_in_the_mean(
    found: dict[str, dict[str, Any]],
) -> None:
    case = found["masks"]
    weights = [(ratio >= TOKEN_MIN).double() for ratio in case["ratios"]]
    within = torch.stack([ratio.log().mean().exp() for ratio in case["ratios"]]) >= SEQUENCE_MIN
    assert 0 < int(within.sum()) < len(within)
    assert case["update"]["loss"] == pytest.approx(_loss(case, weights, case["valid"] & within), abs=1e-6)
    assert case["correction"] == {
        "rollout_masked_tokens": float((torch.cat(weights) == 0).sum()),
        "rollout_masked_completions": float((~within).sum()),
    }


def test_masks_that_mask_nothing_change_no_bit(found: dict[str, dict[str, Any]]) -> None:
    assert found["idle masks"]["update"] == found["off"]["update"]
    assert set(found["idle masks"]["correction"].values()) == {0.0}
