"""On one GPU: Transformer Engine's layers, packed attention and cached decoding against transformers in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.spec import uses_transformer_engine
from megatron_rlt.parallel.environment import Place, torch_environment
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Span, SpannedSequence
from tests.oracle import dense_logprobs
from tests.tiny_models import tiny_hf_model

pytestmark = pytest.mark.gpu
TEMPERATURE = 0.7
# Of bf16 log-probs of the same weights and ids by two routes; these random models' logits are as large as 13.
BF16_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with torch_environment(Place(0, 1, 0, "this test")):
        start_distributed(timeout_seconds=120)
        yield build_layout(LayoutConfig())
        stop_distributed()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_logprobs_equal_transformers(tmp_path: Path, layout: Layout, family: str, dtype: str) -> None:
    folder = tiny_hf_model(tmp_path / "model", family, tied=False, hidden_size=128, head_dim=32)
    model = load_frozen_model(ModelConfig(model=folder, dtype=dtype), layout)  # type: ignore[arg-type]
    engine = LogprobEngine(
        model, temperature=TEMPERATURE, scoring=ScoringConfig(max_tokens_per_pack=64, row_block=16, vocab_block=64)
    )
    generator = torch.Generator().manual_seed(0)
    sequences = [
        SpannedSequence(torch.randint(0, 131, (length,), generator=generator), (Span(1, length),))
        for length in (2, 17, 30, 9)
    ]
    values, exact = torch.cat(engine.logprobs(sequences).values), dense_values(folder, sequences, torch.float32)
    if dtype == "float32":
        torch.testing.assert_close(values, exact, atol=1e-3, rtol=0)
    else:
        own, theirs = (values - exact).abs(), (dense_values(folder, sequences, torch.bfloat16) - exact).abs()
        assert own.mean() < 1.5 * theirs.mean()
        assert own.max() < 2 * theirs.max()


def dense_values(folder: Path, sequences: list[SpannedSequence], dtype: torch.dtype) -> torch.Tensor:
    """Transformers' log-probs of all wanted tokens with weights and activations of `dtype`."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return torch.cat([dense_logprobs(dense, sequence, TEMPERATURE).float() for sequence in sequences])


def test_sampled_logprobs_equal_a_packed_pass(tmp_path: Path, layout: Layout) -> None:
    assert uses_transformer_engine(torch.bfloat16), "install Transformer Engine, or this test proves nothing"
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=True, hidden_size=128, head_dim=32)
    model = load_frozen_model(ModelConfig(model=folder), layout)
    engine = MegatronEngine(
        model,
        temperature=TEMPERATURE,
        top_p=1.0,
        greedy=False,
        num_token_ids=131,
        max_completion_tokens=12,
        max_batch_size=8,
        max_prefill_tokens=1000,
        stop=lambda sampled: False,
    )
    prompts = [torch.arange(1, length) for length in (5, 9, 9, 20)]
    completions = engine.generate([SampleRequest(p, seed) for seed, p in enumerate(prompts)], policy_version=0)
    sequences = [
        SpannedSequence(torch.cat([p, c.token_ids]), (Span(len(p), len(p) + 12),))
        for p, c in zip(prompts, completions, strict=True)
    ]
    scorer = LogprobEngine(
        model, temperature=TEMPERATURE, scoring=ScoringConfig(max_tokens_per_pack=64, row_block=16, vocab_block=64)
    )
    for completion, values in zip(completions, scorer.logprobs(sequences).values, strict=True):
        torch.testing.assert_close(completion.rollout_logprobs, values, atol=BF16_TOLERANCE, rtol=0)
