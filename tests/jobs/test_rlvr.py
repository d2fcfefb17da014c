"""A student's own RL: verdicts become rewards and advantages, questions without signal are replaced and counted."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.config.commands.rlvr import OverlongConfig, RlvrConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.reward.judging import AnswerJudge
from megatron_rlt.jobs.rl.grpo import compute_advantages
from megatron_rlt.jobs.rlvr.run import build_context, run_rlvr
from megatron_rlt.jobs.rlvr.step import _judge_group, sample_judged_groups
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.store.worst_completions import read_worst_completions
from megatron_rlt.types import Completion, FinishReason, Problem, Prompt, RolloutGroup, tell_nobody
from tests.distributed.tiny_runs import ROOT, TinyInputs, tiny_inputs
from tests.ranks import run_ranks

CONFIG = ROOT / "configs" / "demo" / "rlvr_2cpu_tp2sp.yaml"
PROBLEM = Problem("one", "5 +5 *5 *6 +4", "3")
COMPLETIONS = ("5 ; <sol> 3", "5 ; <sol> 4", "5 ; <sol> 3", "so we get 3")  # right, wrong, right, no solution section
LENGTHS = ("<sol> 3", "5 ; <sol> 3", "5 ; ; <sol> 3", "5 ; ; ; <sol> 3")
OVERLONG = {"overlong": OverlongConfig(buffer_tokens=4, weight=0.5), "malformed": 0.0}


@dataclass(frozen=True)
class Outcome:
    """What the ranks found out about the group above, and about a draw by an untrained model."""

    correct: list[bool]
    rewards: list[float]
    advantages: list[float]
    has_signal: bool
    rewards_near_the_end: list[float]  # of right answers of 2, 4, 5 and 6 tokens
    sampled: list[str]  # problem ids of the groups that are trained on
    num_replaced: int
    questions_asked: int


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("solver"), num_rows=10)


def config_of(inputs: TinyInputs, output_dir: Path, *settings: str) -> RlvrConfig:
    small = ["grpo.questions_per_step=2", "grpo.group_size=4", "rollout.max_completion_tokens=6", "num_steps=2"]
    paths = [f"student.model={inputs.model}", f"data.path={inputs.shards}", f"output_dir={output_dir}"]
    return load_config(RlvrConfig, CONFIG, [*small, *paths, "metrics.tensorboard=false", *settings])


def judge_and_draw(inputs: TinyInputs, output_dir: Path) -> Outcome:
    config = config_of(inputs, output_dir, "verifier.malformed=-0.5", "verifier.max_sampling_rounds=3")
    student = student_format(config.student.model, config.prompts)
    asked: list[Problem] = []

    def next_problems(count: int) -> list[Problem]:
        new = [Problem(f"{len(asked) + n}", PROBLEM.question, PROBLEM.solution) for n in range(count)]
        asked.extend(new)
        return new

    with AnswerJudge(config.verifier.kind, student.tags, timeout_seconds=5.0) as judge:
        context = build_context(config, student, judge, tell_nobody)
        group = RolloutGroup(
            Prompt(PROBLEM, torch.tensor([1])), tuple(_completion(context.student, t) for t in COMPLETIONS)
        )
        verdicts = [judge.verdict(PROBLEM, text) for text in COMPLETIONS]
        judged = _judge_group(context, group, COMPLETIONS, verdicts)
        scored, _ = context.learner.score([group], 0, PhaseTimer(heartbeat=tell_nobody, memory=MemoryLedger()))
        rewarded = [replace(one, reward=reward) for one, reward in zip(scored, judged.rewards, strict=True)]
        advantages = [one.advantage for one in compute_advantages(rewarded, context.learner.grpo, smallest_spread=0.0)]
        strict = replace(context, verifier=context.verifier.model_copy(update=OVERLONG))
        longer = RolloutGroup(group.prompt, tuple(_completion(context.student, text) for text in LENGTHS))
        near_the_end = _judge_group(strict, longer, LENGTHS, [judge.verdict(PROBLEM, text) for text in LENGTHS])
        timer = PhaseTimer(heartbeat=tell_nobody, memory=MemoryLedger())
        sampled, num_replaced = sample_judged_groups(context, next_problems, 0, timer)
    return Outcome(
        [verdict.correct for verdict in judged.verdicts],
        list(judged.rewards),
        advantages,
        judged.has_signal,
        list(near_the_end.rewards),
        [one.group.prompt.problem.problem_id for one in sampled],
        num_replaced,
        len(asked),
    )


def _completion(student: Any, text: str) -> Completion:
    ids = torch.tensor(student.tokenizer.encode(text))
    return Completion(ids, torch.zeros(len(ids)), 1.0, FinishReason.STOP, seed=0, policy_version=0)


def test_verdicts_become_rewards_and_advantages_and_flat_questions_are_replaced(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    for outcome in run_ranks(judge_and_draw, 2, inputs, tmp_path / "run"):
        assert outcome.correct == [True, False, True, True]  # without a solution section the whole text is judged
        assert outcome.rewards == [1.0, 0.0, 1.0, 0.5]  # the last one is right but malformed: 1 - 0.5
        # mean 0.625, deviations (.375, -.625, .375, -.125), std sqrt((.1406 * 2 + .3906 + .0156) / 3) = .478714
        expected = [0.783184, -1.305307, 0.783184, -0.261061]
        assert outcome.advantages == pytest.approx(expected, abs=1e-5)
        assert outcome.has_signal
        # A budget of 6 tokens whose last 4 cost up to 0.5: 0.5 * (2 - 2, 4 - 2, 5 - 2, 6 - 2) / 4 less than 1.
        assert outcome.rewards_near_the_end == [1.0, 0.75, 0.625, 0.5]
        # The untrained model's answers are all wrong: three rounds of two questions, the last two fill the batch.
        assert (outcome.questions_asked, outcome.num_replaced) == (6, 4)
        assert outcome.sampled == ["4", "5"]


def train(inputs: TinyInputs, output_dir: Path) -> int:
    config = config_of(
        inputs, output_dir, "verifier.kind=exact", "grpo.reference.beta=0.1", "grpo.aggregation=constant"
    )
    heartbeat = Heartbeat(rank=0, folder=output_dir, timeout_seconds=600)
    return run_rlvr(config, heartbeat)


def test_a_run_writes_its_metrics_and_the_student(inputs: TinyInputs, tmp_path: Path) -> None:
    assert run_ranks(train, 2, inputs, tmp_path / "run") == [0, 0]
    steps = read_metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 <= step["rollout_gap_p99"] <= step["rollout_gap_max"] < 1e-4
        assert 0 <= step["accuracy"] <= 1
        assert step["accuracy"] == pytest.approx(step["reward"])  # 1 for a right answer, 0 for any other
        assert step["groups_with_signal"] <= 2
    worst = read_worst_completions(tmp_path / "run")
    assert [(line["step"], line["gap"]) for line in worst] == [(s["step"], s["rollout_gap_max"]) for s in steps]
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"] == "rlvr"
