"""The embedded engine against transformers: greedy decoding, sampled tokens and log-probs in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.forward import run_stage, target_logprobs
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, pack
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.megatron.decoding_batch import Row
from megatron_rlt.rollout.megatron.engine import MegatronEngine, _require_agreement
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed, sample, uniforms
from megatron_rlt.types import Completion, FinishReason, Span, SpannedSequence
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

MAX_COMPLETION_TOKENS = 10
PROMPT_LENGTHS = (7, 1, 12, 4)
GROUP_SIZE = 4


@dataclass(frozen=True)
class Case:
    """One call of the engine."""

    name: str
    max_batch_size: int = 64
    max_prefill_tokens: int = 1000
    order: tuple[int, ...] = tuple(range(len(PROMPT_LENGTHS) * GROUP_SIZE))  # which requests, in which order
    temperature: float = 0.7
    top_p: float = 1.0
    greedy: bool = False
    num_token_ids: int = 131  # all of the tiny model's


CASES = (
    Case("all at once"),
    Case("three at a time, prompts one by one", max_batch_size=3, max_prefill_tokens=1),
    Case("one at a time", max_batch_size=1, order=(5, 2)),
    Case("reversed, joining", max_batch_size=5, order=tuple(reversed(range(16)))),
    Case("a few of several groups", order=(15, 0, 9, 3, 4)),
    Case("nucleus", top_p=0.6),
    Case("hot", temperature=1.0, max_batch_size=8),
    Case("half of the ids", num_token_ids=65),
    Case("greedy", greedy=True, order=(0, 4, 8, 12)),
)
LAYOUTS_OF_TWO = (
    LayoutConfig(),  # dp 2
    LayoutConfig(tp=2),
    LayoutConfig(tp=2, sp=True),
    LayoutConfig(pp=2),
    LayoutConfig(cp=2),
)
Outcome = list[tuple[list[int], list[float], FinishReason]]


def stop(sampled_ids: Sequence[int]) -> bool:
    """End at one id of seven: some completions stop at once, some run out of budget."""
    return sampled_ids[-1] % 7 == 3


def make_requests() -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(131, (length,), generator=generator) for length in PROMPT_LENGTHS]
    return [
        SampleRequest(prompt, completion_seed(11, 0, question, member))
        for question, prompt in enumerate(prompts)
        for member in range(GROUP_SIZE)
    ]


def generate_cases(folder: Path, layouts: Sequence[LayoutConfig], cases: Sequence[Case]) -> dict[str, Outcome]:
    requests = make_requests()
    outcomes: dict[str, Outcome] = {}
    for config in layouts:
        layout = build_layout(config)
        model = loaded_model(folder, layout, torch.float32)
        for case in cases:
            completions = _engine(model, case).generate([requests[i] for i in case.order], policy_version=5)
            assert all(c.policy_version == 5 and c.temperature == case.temperature for c in completions)
            assert [c.seed for c in completions] == [requests[i].seed for i in case.order]
            outcomes[f"{layout}: {case.name}"] = [_outcome(c) for c in completions]
        assert _engine(model, cases[0]).generate([], policy_version=0) == []
        _check_still_trainable(model)
    return outcomes


def _engine(model: LanguageModel, case: Case) -> MegatronEngine:
    return MegatronEngine(
        model,
        temperature=case.temperature,
        top_p=case.top_p,
        greedy=case.greedy,
        num_token_ids=case.num_token_ids,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        max_batch_size=case.max_batch_size,
        max_prefill_tokens=case.max_prefill_tokens,
        stop=stop,
    )


def _outcome(completion: Completion) -> tuple[list[int], list[float], FinishReason]:
    assert completion.token_ids.dtype == torch.int64
    assert completion.rollout_logprobs.dtype == torch.float32
    return completion.token_ids.tolist(), completion.rollout_logprobs.tolist(), completion.finish_reason


def _check_still_trainable(model: LanguageModel) -> None:
    """Sampling leaves no trace in the policy: training mode, sequence parallelism, gradients of the very next pass."""
    layout = model.layout
    assert model.training
    assert model.config.sequence_parallel == layout.sp
    if layout.pp > 1:
        return
    sequence = SpannedSequence(torch.arange(8), (Span(1, 8),))
    batch = pack(
        [sequence], [0], max_tokens=None, max_sequences=None, alignment=alignment_of(layout, token_multiple=1)
    )[0]
    with layout:
        blocks = {"row_block": 8, "vocab_block": 64}
        logprobs, _ = target_logprobs(model, run_stage(model, batch), batch, temperature=0.7, **blocks)
        logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("policy"), "qwen3", tied=False, num_layers=2)


@pytest.fixture(scope="module")
def dense(folder: Path) -> dict[str, Outcome]:
    """Each case by whole forward passes of transformers' model, one request at a time, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    requests = make_requests()
    return {case.name: [_dense_completion(model, requests[i], case) for i in case.order] for case in CASES}


@torch.no_grad()
def _dense_completion(
    model: torch.nn.Module, request: SampleRequest, case: Case
) -> tuple[list[int], list[float], FinishReason]:
    ids, logprobs = request.token_ids.tolist(), []
    for position in range(MAX_COMPLETION_TOKENS):
        logits = model(torch.tensor([ids])).logits[:, -1, : case.num_token_ids]
        number = uniforms(torch.tensor([request.seed]), torch.tensor([position]))
        token, logprob = sample(logits, temperature=case.temperature, top_p=case.top_p, uniforms=number)
        if case.greedy:
            token = logits.argmax(-1)
            logprob = torch.log_softmax(logits / case.temperature, -1)[:, token[0]]
        ids.append(int(token))
        logprobs.append(float(logprob))
        if stop(ids):
            return ids[request.token_ids.numel() :], logprobs, FinishReason.STOP
    return ids[request.token_ids.numel() :], logprobs, FinishReason.LENGTH


def _assert_equal(outcomes: dict[str, Outcome], dense: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        expected = dense[name.partition(": ")[2]]
        assert [(ids, reason) for ids, _, reason in outcome] == [(ids, reason) for ids, _, reason in expected], name
        for (_, logprobs, _), (_, expected_logprobs, _) in zip(outcome, expected, strict=True):
            assert logprobs == pytest.approx(expected_logprobs, abs=2e-5), name


def test_dense_completions_end_both_ways_and_differ_within_a_group(dense: dict[str, Outcome]) -> None:
    """Guards the tests below: they would prove little if all completions were alike."""
    outcome = dense["all at once"]
    assert {reason for _, _, reason in outcome} == {FinishReason.STOP, FinishReason.LENGTH}
    assert len({tuple(ids) for ids, _, _ in outcome}) >= len(outcome) - 1
    assert {len(ids) for ids, _, _ in outcome} >= {1, MAX_COMPLETION_TOKENS}
    assert [ids for ids, _, _ in dense["nucleus"]] != [ids for ids, _, _ in outcome]


def test_greedy_decoding_equals_transformers_generate(folder: Path, dense: dict[str, Outcome]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stop_ids = [token for token in range(131) if token % 7 == 3]
    for index, (ids, _, _) in zip(CASES[-1].order, dense["greedy"], strict=True):
        prompt = make_requests()[index].token_ids
        generated = model.generate(
            prompt[None], do_sample=False, max_new_tokens=MAX_COMPLETION_TOKENS, eos_token_id=stop_ids, pad_token_id=0
        )
        assert generated[0, prompt.numel() :].tolist() == ids


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[tuple[dict[str, Outcome], str]]:
    return run_ranks(_sample_and_disagree, 2, folder)


def test_two_ranks_sample_the_dense_models_tokens_in_every_layout(
    two_ranks: list[tuple[dict[str, Outcome], str]], dense: dict[str, Outcome]
) -> None:
    (first, _), (second, _) = two_ranks
    assert first == second, "all ranks must hold all completions"
    assert len(first) == len(LAYOUTS_OF_TWO) * len(CASES)
    _assert_equal(first, dense)


def test_four_ranks_sample_the_dense_models_tokens(folder: Path, dense: dict[str, Outcome]) -> None:
    layouts = [LayoutConfig(tp=2, pp=2, sp=True), LayoutConfig(pp=2), LayoutConfig(tp=2, sp=True, cp=2)]
    ranks = run_ranks(generate_cases, 4, folder, layouts, [CASES[1], CASES[5], CASES[-1]])
    assert all(rank == ranks[0] for rank in ranks)
    _assert_equal(ranks[0], dense)


def test_ranks_that_sample_different_tokens_are_named(two_ranks: list[tuple[dict[str, Outcome], str]]) -> None:
    for _, message in two_ranks:
        assert "ranks [1] sampled other tokens than rank 0" in message


def _sample_and_disagree(folder: Path) -> tuple[dict[str, Outcome], str]:
    outcomes = generate_cases(folder, LAYOUTS_OF_TWO, CASES)
    layout = build_layout(LayoutConfig(tp=2))
    rows = [Row(0, make_requests()[0], sampled_ids=[1, 2, layout.tp_rank])]
    with pytest.raises(RuntimeError) as error:
        _require_agreement(rows, layout)
    return outcomes, str(error.value)
