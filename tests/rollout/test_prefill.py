"""What a group shares and what its members cost: prompts computed once, finished rows gone, nobody's tokens changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.megatron.engine import MegatronEngine, SamplingWork
from megatron_rlt.rollout.requests import SampleRequest, StopCondition
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.types import Completion
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

MAX_COMPLETION_TOKENS = 9
PROMPT_LENGTHS = (6, 11, 2)
GROUP_SIZE = 5
# Other batch shapes are other shapes of products, which round differently.
ROUNDING = 2e-5
# In order; and so that each group's members come apart, with other groups between them.
ORDERS = (tuple(range(15)), tuple(member * 5 % 14 if member < 14 else 14 for member in range(15)))


@dataclass(frozen=True)
class Sampled:
    """One call's completions and their cost."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    work: SamplingWork


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sampled]:
    folder = tiny_hf_model(tmp_path_factory.mktemp("policy"), "qwen2", tied=True, num_layers=2)
    return run_ranks(_sample, 1, folder)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_a_prompt_goes_through_the_model_once_however_its_group_joins(
    sampled: dict[str, Sampled], batch_size: int, order: int
) -> None:
    assert sampled[f"batches of {batch_size}, order {order}"].work.prompt_tokens == sum(PROMPT_LENGTHS)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_sharing_a_prompt_changes_no_sample(sampled: dict[str, Sampled], batch_size: int, order: int) -> None:
    alone, shared = sampled["alone"], sampled[f"batches of {batch_size}, order {order}"]
    assert alone.work.prompt_tokens == GROUP_SIZE * sum(PROMPT_LENGTHS)
    assert len({tuple(ids) for ids in alone.token_ids}) > 10, "samples that are all alike would prove little"
    assert shared.token_ids == [alone.token_ids[index] for index in ORDERS[order]]
    for index, logprobs in zip(ORDERS[order], shared.logprobs, strict=True):
        assert logprobs == pytest.approx(alone.logprobs[index], abs=ROUNDING)


def test_a_finished_row_is_not_computed_again(sampled: dict[str, Sampled]) -> None:
    """A completion's first token comes from its prompt's logits, each other one from one row of one step."""
    found = sampled["batches of 64, order 0"]
    lengths = [len(ids) for ids in found.token_ids]
    assert min(lengths) < max(lengths), "some rows must leave before the others"
    assert found.work.decoded_rows == sum(lengths) - len(lengths)
    assert found.work.num_steps == max(lengths) - 1


def test_rows_that_leave_change_nothing_for_those_that_stay(sampled: dict[str, Sampled]) -> None:
    leaving, staying = sampled["batches of 64, order 0"], sampled["nobody stops"]
    assert all(len(ids) == MAX_COMPLETION_TOKENS for ids in staying.token_ids)
    for left, stayed in zip(leaving.token_ids, staying.token_ids, strict=True):
        assert left == stayed[: len(left)]
    for left_logprobs, stayed_logprobs in zip(leaving.logprobs, staying.logprobs, strict=True):
        assert left_logprobs == pytest.approx(stayed_logprobs[: len(left_logprobs)], abs=ROUNDING)


def _sample(folder: Path) -> dict[str, Sampled]:
    layout = build_layout(LayoutConfig())
    model = loaded_model(folder, layout, torch.float32)
    requests = _requests()
    outcomes = {"alone": _alone(_engine(model, 64, _stop), requests)}
    outcomes["nobody stops"] = _together(_engine(model, 64, lambda _: False), requests)
    for number, order in enumerate(ORDERS):
        for batch_size in (1, 3, 4, 64):
            engine = _engine(model, batch_size, _stop)
            outcomes[f"batches of {batch_size}, order {number}"] = _together(engine, [requests[i] for i in order])
    return outcomes


def _engine(model: LanguageModel, max_batch_size: int, stop: StopCondition) -> MegatronEngine:
    return MegatronEngine(
        model,
        temperature=1.0,
        top_p=1.0,
        greedy=False,
        num_token_ids=131,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        max_batch_size=max_batch_size,
        max_prefill_tokens=22,  # two of the prompts run together, the third by itself
        stop=stop,
    )


def _requests() -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(131, (length,), generator=generator) for length in PROMPT_LENGTHS]
    return [
        SampleRequest(prompt, completion_seed(2, 0, question, member))
        for question, prompt in enumerate(prompts)
        for member in range(GROUP_SIZE)
    ]


def _stop(sampled_ids: Sequence[int]) -> bool:
    return sampled_ids[-1] % 6 == 1


def _together(engine: MegatronEngine, requests: Sequence[SampleRequest]) -> Sampled:
    return _record(engine.generate(requests, policy_version=0), engine.work)


def _alone(engine: MegatronEngine, requests: Sequence[SampleRequest]) -> Sampled:
    """Every completion from a call of its own: nothing can be shared."""
    completions: list[Completion] = []
    prompt_tokens = 0
    for request in requests:
        completions += engine.generate([request], policy_version=0)
        prompt_tokens += engine.work.prompt_tokens
    return _record(completions, SamplingWork(prompt_tokens, 0, 0, 0.0, 0.0))


def _record(completions: Sequence[Completion], work: SamplingWork) -> Sampled:
    return Sampled(
        [c.token_ids.tolist() for c in completions], [c.rollout_logprobs.tolist() for c in completions], work
    )
