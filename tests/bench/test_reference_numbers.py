"""Rewards are those of the reference's own module where both score the same tokens; its numbers are data here."""

from __future__ import annotations

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
from tests.bench.reference_cases import (
    STUDENT_SYSTEM,
    TEACHER_SYSTEM,
    TEMPERATURE,
    WORDS,
    ReferenceCase,
    reference_cases,
    reference_models,
)
from tests.ranks import run_ranks
from tools.bench.against_trl import reward_texts
from tools.bench.reference_reward import ReferenceReward, RewardSettings

END_TAG = "<|end_of_explanation|>"
# A log-prob of size 10 has float32 spacing 1e-6; lambda multiplies the difference of two of them by 3.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """By tokenizer: all settings that the paper leaves to nobody are the defaults."""
    made = {}
    for kind in WORDS:
        folder = tmp_path_factory.mktemp(kind)
        teacher, student = reference_models(folder, kind)
        settings = {
            "output_dir": folder / "run",
            "teacher": {"model": teacher, "dtype": "float32"},
            "student": {"model": student, "dtype": "float32"},
            "data": {"path": folder},
            "prompts": {"teacher_system": TEACHER_SYSTEM, "student_system": STUDENT_SYSTEM},
            "temperature": TEMPERATURE,
            "grpo": {"reference": None},
        }
        made[kind] = TrainConfig.model_validate(settings)
    return made


def _our_rewards(configs: dict[str, TrainConfig], cases: list[ReferenceCase]) -> list[dict[str, float]]:
    """Per case the rewards of the sampled completion and, where it is whole, of the explanation given as text."""
    contexts = {kind: build_context(config, student_pairs(config), tell_nobody) for kind, config in configs.items()}
    found = []
    for case in cases:
        context = contexts[case.tokenizer]
        scorer = context.students["student"]
        pairs, problem = scorer.pairs, Problem("", case.question, case.solution)
        ids = torch.tensor(pairs.teacher.tokenizer.encode(case.completion))
        completion = Completion(ids, torch.zeros(len(ids)), TEMPERATURE, FinishReason.STOP, seed=0, policy_version=0)
        scored = {"sampled": pairs.pair(pairs.teacher.prompt(problem), completion)}
        explanation = case.completion.removesuffix(f"\n\n{END_TAG}")
        if explanation != case.completion:
            scored["given"] = pairs.pair_from_text(problem, explanation)
            scored["with newlines"] = pairs.pair_from_text(problem, f"\n\n{explanation}\n\n")
        timer = PhaseTimer(heartbeat=tell_nobody, memory=MemoryLedger())
        rewards = score_pairs(context.learner.old_policy, scorer, list(scored.values()), timer)
        found.append({name: reward.total for name, reward in zip(scored, rewards, strict=True)})
    return found


def test_rewards_are_those_of_the_references_own_module(configs: dict[str, TrainConfig]) -> None:
    """Sampled or given, and with a missing end tag, where the tokenizer joins newlines with the tag before them.

    Where it keeps them apart, the module counts the newlines before an explanation; here they count where the
    explanation's text brings them.
    """
    cases = reference_cases()
    (found,) = run_ranks(_our_rewards, 1, configs, cases)
    for case, rewards in zip(cases, found, strict=True):
        equal = {name for name, reward in rewards.items() if abs(reward - case.reward) < TOLERANCE}
        if case.tokenizer == "joined":
            assert equal == rewards.keys(), case
        else:
            assert equal == rewards.keys() & {"with newlines"}, case
            assert rewards.get("given", rewards["sampled"]) == pytest.approx(rewards["sampled"], abs=TOLERANCE)
    assert sum("given" in rewards for rewards in found) == 2 * 3
    assert min(abs(a.reward - b.reward) for a in cases for b in cases if a is not b) > 100 * TOLERANCE


def test_the_rewards_way_of_the_bench_is_the_references(configs: dict[str, TrainConfig]) -> None:
    """With separators and padding, for both kinds of tokenizer."""
    for kind, config in configs.items():
        settings = RewardSettings(temperature=TEMPERATURE, alpha=0.01, lambda_kl=3.0, missing_end_tag=-1.0)
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(model.model, dtype=torch.float32).eval()
            for model in (config.teacher, config.student)
        )
        reference = ReferenceReward(AutoTokenizer.from_pretrained(config.teacher.model), teacher, student, settings)
        pairs = pair_builder(config.teacher.model, config.student.model, config.prompts)
        for case in (case for case in reference_cases() if case.tokenizer == kind):
            texts = reward_texts(pairs, Problem("", case.question, case.solution))
            assert reference.reward(texts, case.completion) == pytest.approx(case.reward, abs=TOLERANCE), case
