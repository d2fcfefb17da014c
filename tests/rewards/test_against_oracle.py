"""The reward of two real Hugging Face models' log-probs, against the dense oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.reward import PenaltyConfig, RewardConfig
from megatron_rlt.parallel.vocab_divergence import vocab_divergence
from megatron_rlt.parallel.vocab_logprobs import vocab_parallel_logprobs
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.types import FormatFlag, Problem, RewardEvidence, ScoringPair, Span, SpannedSequence
from tests.oracle import dense_divergence, dense_entropy, dense_reward
from tests.rewards.evidence import NO_LEAKS
from tests.tiny_models import tiny_hf_model

VOCAB_SIZE = 131


def scoring_pair(explanation_length: int) -> ScoringPair:
    """Prefixes of 9 and 5 tokens; 2 tokens (end tag, end of turn) after the explanation; a solution of 4."""
    ids = torch.randint(VOCAB_SIZE, (64,), generator=torch.Generator().manual_seed(1))
    explanation = ids[:explanation_length]
    teacher = torch.cat([ids[20:29], explanation, ids[29:31]])
    student = torch.cat([ids[31:36], explanation, ids[36:39], ids[39:43], ids[43:44]])
    end = 5 + explanation_length
    return ScoringPair(
        problem=Problem("p", "q", "s"),
        teacher=SpannedSequence(teacher, (Span(9, len(teacher)),)),
        student=SpannedSequence(student, (Span(5, end), Span(end + 3, end + 7))),
        num_explanation_tokens=explanation_length,
        flags=frozenset() if explanation_length else frozenset({FormatFlag.EMPTY}),
        explanation_text="",
    )


@pytest.mark.parametrize("explanation_length", [1, 11])
@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
@torch.no_grad()
def test_reward_of_blocked_logprobs_equals_the_dense_oracle(
    tmp_path: Path, estimator: Any, explanation_length: int
) -> None:
    paths = [
        tiny_hf_model(tmp_path / "teacher", "qwen2", tied=False, num_layers=1),
        tiny_hf_model(tmp_path / "student", "llama", tied=True, num_layers=1, hidden_size=32, seed=1),
    ]
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in paths)
    pair = scoring_pair(explanation_length)
    expected = dense_reward(
        teacher, student, pair, temperature=0.7, alpha=0.01, lambda_kl=3.0, kl_estimator=estimator, penalty=0.0
    )
    hidden, weights, logprobs = [], [], []
    for model, sequence in ((teacher, pair.teacher), (student, pair.student)):
        rows = model.model(sequence.token_ids[None]).last_hidden_state[0, sequence.target_positions - 1]
        targets = sequence.token_ids[sequence.target_positions]
        weight = model.lm_head.weight.detach()
        values, entropy = vocab_parallel_logprobs(
            rows,
            weight,
            targets,
            temperature=0.7,
            vocab_size=VOCAB_SIZE,
            tp_group=None,
            row_block=5,
            vocab_block=50,
        )
        torch.testing.assert_close(entropy.double(), dense_entropy(model, sequence, 0.7), rtol=0, atol=1e-5)
        hidden.append(rows[:explanation_length])
        weights.append(weight)
        logprobs.append(values)
    blocks = [(start, start + 1, weights[0][start : start + 1], weights[1][start : start + 1]) for start in range(131)]
    divergence = vocab_divergence(hidden[0], hidden[1], blocks, temperature=0.7, row_block=4)
    torch.testing.assert_close(divergence.double(), dense_divergence(teacher, student, pair, 0.7), rtol=1e-6, atol=1e-5)
    evidence = RewardEvidence(
        teacher_explanation_logprobs=logprobs[0][:explanation_length],
        student_explanation_logprobs=logprobs[1][:explanation_length],
        student_solution_logprobs=logprobs[1][explanation_length:],
        baseline_solution_logprobs=None,
        divergence=divergence if estimator == "full" else None,
        flags=pair.flags,
        leaks=NO_LEAKS,
        one_tokenizer=True,
    )
    reward = rlt_reward(evidence, RewardConfig(kl_estimator=estimator, penalties=PenaltyConfig(missing_end_tag=0.0)))
    measured = {name: value for name, value in reward.terms.items() if name != "penalty"} | {"reward": reward.total}
    assert measured == pytest.approx(expected, rel=1e-6, abs=1e-5)
