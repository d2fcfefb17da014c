"""The reward that TRL's side of the bench computes is this project's where both read the same tokens."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.jobs.reward.scorer import score_pairs
from megatron_rlt.jobs.train.engines import build_context, student_pairs
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.prompts.pairs import pair_builder
from megatron_rlt.types import Completion, FinishReason, Problem, tell_nobody
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tools.bench.against_trl import TAGS, reward_texts
from tools.bench.reference_reward import ReferenceReward, RewardSettings
from tools.demo.tokenizer import save_tokenizer

PROBLEM = Problem("0", "w1 w2 w3 w1", "w4 w1 w2")
# The solution repeated, words of the question, one token, no end tag.
EXPLANATIONS = ("w4 w1 w2 </exp>", "w1 w2 w3 w1 w5 w6 </exp>", "w7 </exp>", "w8 w1 w2 w9 w3")
WORDS = [f"w{number}" for number in range(10)]


def _config(folder: Path) -> TrainConfig:
    size = save_tokenizer(folder / "teacher", WORDS)
    assert save_tokenizer(folder / "student", WORDS) == size
    for seed, name in enumerate(("teacher", "student")):
        tiny_hf_model(folder / name, "llama", tied=False, seed=seed, vocab_size=size, num_layers=2)
    settings = {
        "output_dir": folder / "run",
        "teacher": {"model": folder / "teacher", "dtype": "float32"},
        "student": {"model": folder / "student", "dtype": "float32"},
        "data": {"path": folder},
        "prompts": {"custom_tags": TAGS, "teacher_system": "", "student_system": "", "exact_text": False},
        "grpo": {"reference": None},
    }
    return TrainConfig.model_validate(settings)


def _our_rewards(config: TrainConfig, token_ids: list[list[int]]) -> list[float]:
    context = build_context(config, student_pairs(config), tell_nobody)
    student = context.students["student"]
    pairs = student.pairs
    prompt = pairs.teacher.prompt(PROBLEM)
    scored = [pairs.pair(prompt, _completion(ids, config.temperature)) for ids in token_ids]
    timer = PhaseTimer(heartbeat=tell_nobody, memory=MemoryLedger())
    return [reward.total for reward in score_pairs(context.learner.old_policy, student, scored, timer)]


def _completion(token_ids: list[int], temperature: float) -> Completion:
    return Completion(
        token_ids=torch.tensor(token_ids),
        rollout_logprobs=torch.zeros(len(token_ids)),
        temperature=temperature,
        finish_reason=FinishReason.STOP,
        seed=0,
        policy_version=0,
    )


def _reference(config: TrainConfig, tokenizer: Any) -> ReferenceReward:
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(model.model, dtype=torch.float32).eval()
        for model in (config.teacher, config.student)
    )
    settings = RewardSettings(
        temperature=config.temperature,
        alpha=config.reward.alpha,
        lambda_kl=config.reward.lambda_kl,
        missing_end_tag=config.reward.penalties.missing_end_tag,
    )
    return ReferenceReward(tokenizer, teacher, student, settings)


def test_the_reference_reward_is_ours_where_both_read_the_same_tokens(tmp_path: Path) -> None:
    config = _config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    token_ids = tokenizer(list(EXPLANATIONS), add_special_tokens=False)["input_ids"]
    (ours,) = run_ranks(_our_rewards, 1, config, token_ids)
    texts = reward_texts(pair_builder(tmp_path / "teacher", tmp_path / "student", config.prompts), PROBLEM)
    columns = {name: [text] * len(EXPLANATIONS) for name, text in asdict(texts).items()}
    decoded = tokenizer.batch_decode(token_ids, skip_special_tokens=True)  # as TRL hands completions to rewards
    found = _reference(config, tokenizer).rewards(decoded, **columns)
    # A log-prob of size 10 has float32 spacing 1e-6; lambda multiplies the difference of two of them by 3.
    assert found == pytest.approx(ours, abs=1e-4)
    assert min(abs(a - b) for a in ours for b in ours if a is not b) > 1e-2, "the cases differ"


def test_text_in_which_a_piece_has_other_tokens_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    reward = _reference(config, AutoTokenizer.from_pretrained(tmp_path / "teacher"))
    pairs = pair_builder(tmp_path / "teacher", tmp_path / "student", config.prompts)
    texts = reward_texts(pairs, PROBLEM)
    joined = replace(texts, solution="w4", ending="2")  # read together as one word, w42, which is unknown
    with pytest.raises(ValueError, match="other ones within the text than alone"):
        reward.reward(joined, "w5 </exp>")
    with pytest.raises(ValueError, match="no tokens"):
        reward.reward(texts, " </exp>")
