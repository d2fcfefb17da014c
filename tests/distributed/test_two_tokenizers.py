"""A student with a tokenizer of its own: r_SS is that of the dense oracle on texts, in every layout and every job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.jobs.reweigh import reweighed_rows
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanations import read_explanations, reward_settings
from megatron_rlt.types import FormatFlag
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL
from tests.jobs.tiny_collect import NUM_EXPLANATIONS, QUESTIONS_PER_PART, TAGS, CollectInputs, collect_on_ranks, rows_of
from tests.jobs.tiny_scores import QUESTION, TRACES, PhaseLog, ScoreInputs, score_inputs, score_on_ranks, write_rows
from tests.jobs.two_tokenizers import TextOracle, foreign_student
from tests.ranks import run_ranks

ALPHA, TEMPERATURE, TAG_PENALTY = 0.05, 0.7, -0.25
REWARD = {"alpha": ALPHA, "lambda_kl": 0.0, "penalties": {"contains_tags": TAG_PENALTY}}
LAYOUTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"tp": 2, "sp": True}, {"pp": 2}),
    ({"pp": 2}, {"tp": 2, "sp": True}),
)
KL_PARTS = ("r_kl", "r_kl_mean", "r_kl_max", "kl_per_token")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ScoreInputs:
    folder = tmp_path_factory.mktemp("score")
    own = score_inputs(folder)
    return ScoreInputs(own.teacher, foreign_student(folder / "foreign"), own.rows)


def _score(configs: list[ScoreConfig]) -> list[int]:
    return [score_on_ranks(config, PhaseLog()) for config in configs]


def test_score_equals_the_oracle_on_texts_in_every_layout(inputs: ScoreInputs, tmp_path: Path) -> None:
    oracle = TextOracle(
        inputs.student,
        opening="<|begin_of_thought|>\n\n",
        bridge="<|end_of_thought|>\n\n<|begin_of_solution|>",
        closing="<|end_of_solution|>",
    )
    configs = [
        inputs.config(
            tmp_path / str(number),
            temperature=TEMPERATURE,
            teacher={"model": inputs.teacher, "dtype": "float32", "layout": teacher},
            student={"model": inputs.student, "dtype": "float32", "layout": student},
            reward=REWARD,
            world_size=2,
        )
        for number, (teacher, student) in enumerate(LAYOUTS)
    ]
    assert run_ranks(_score, 2, configs) == [[0] * len(configs)] * 2

    for config in configs:
        rows = pq.read_table(config.output).to_pylist()
        assert any(row["explanation_tokens"] != len(row["student_explanation_logprobs"]) for row in rows)
        for row, (solution, explanation) in zip(rows, TRACES, strict=True):
            own = explanation.removeprefix("\n\n").removesuffix("\n\n")
            read, section = f"{own}\n\n" if own else "", f"\n\n{solution}\n\n"
            expected = oracle.solution_logprobs(QUESTION, read, section, temperature=TEMPERATURE)
            assert row["student_solution_logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
            assert len(row["student_explanation_logprobs"]) == oracle.num_explanation_tokens(read, section)
            assert [row[name] for name in KL_PARTS] == [None] * 4
            if not explanation:
                assert (row["reward"], row["dropped"]) == (None, "empty explanation")
                continue
            r_ss = float(expected.mean() + ALPHA * expected.min())
            assert row["r_ss"] == pytest.approx(r_ss, abs=1e-5)
            assert row["reward"] == pytest.approx(r_ss + TAG_PENALTY * ("contains_tags" in row["flags"]), abs=1e-5)
    _assert_reweigh_changes_r_ss_and_refuses_r_kl(configs[0].output)


def _assert_reweigh_changes_r_ss_and_refuses_r_kl(scores: Path) -> None:
    settings = reward_settings(scores)
    assert settings is not None
    rows = reweighed_rows((scores,), settings, settings.model_copy(update={"alpha": 0.5}))
    for row, stored in zip(rows, pq.read_table(scores).to_pylist(), strict=True):
        if stored["reward"] is None:
            assert row["reward"] is None
            continue
        expected = stored["reward"] + (0.5 - ALPHA) * stored["r_ss_min"]
        assert row["reward"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"another tokenizer, so it has no KL; keep reward\.lambda_kl=0"):
        reweighed_rows((scores,), settings, settings.model_copy(update={"lambda_kl": 3.0}))


def test_a_reward_that_compares_tokens_is_refused_before_a_model_loads(inputs: ScoreInputs, tmp_path: Path) -> None:
    rewards = ({}, {"lambda_kl": 0.0, "kl_estimator": "full"})
    configs = [inputs.config(tmp_path / str(number), reward=reward) for number, reward in enumerate(rewards)]
    said = []
    for config in configs:
        with pytest.raises(ValueError, match="tokenizer") as refusal:
            config.check()
        said.append(str(refusal.value))
    refused, full = said
    assert "r_KL compares token by token and needs one tokenizer; set reward.lambda_kl=0" in refused
    assert full.startswith("reward.kl_estimator=full: compares two distributions over one vocabulary")
    assert "\n" not in refused + full
    assert not any(config.output_dir.exists() or config.output.exists() for config in configs)


def _collect(configs: list[CollectConfig]) -> list[int]:
    return [collect_on_ranks(config)[0] for config in configs]


def test_collected_explanations_and_controls_go_through_text(inputs: ScoreInputs, tmp_path: Path) -> None:
    rows = [{"id": str(number), "question": f"{QUESTION} {number}", "solution": "the wind"} for number in range(3)]
    collected = CollectInputs(inputs.teacher, inputs.student, write_rows(tmp_path / "rows.jsonl", rows))
    configs = [collected.config(tmp_path, reward=REWARD, control=control) for control in ("none", "shuffled")]
    assert run_ranks(_collect, 1, configs) == [[0, 0]]

    oracle = TextOracle(
        inputs.student,
        opening=f"{TAGS['thought_open']} ",
        bridge=f"{TAGS['thought_close']}{TAGS['separator']}{TAGS['solution_open']}",
        closing="",
    )
    teacher: Any = AutoTokenizer.from_pretrained(inputs.teacher)
    for config, folder in zip(configs, ("scored", "control_shuffled"), strict=True):
        found = rows_of(config, folder)
        assert len(found) == 3 * NUM_EXPLANATIONS > QUESTIONS_PER_PART
        for row in found:
            read = row["explanation"] if row["control_ids"] is None else teacher.decode(row["control_ids"])
            assert len(row["student_explanation_logprobs"]) == oracle.num_explanation_tokens(read, " the wind")
            expected = oracle.solution_logprobs(row["question"], read, " the wind", temperature=config.temperature)
            assert row["student_solution_logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
            assert [row[name] for name in KL_PARTS] == [None] * 4
    assert any(row["control_ids"] for row in rows_of(configs[1], "control_shuffled"))


def test_train_runs_end_to_end_without_r_kl(inputs: ScoreInputs, tmp_path: Path) -> None:
    """Through the command line: a Qwen-like teacher with tensor parallelism beside a data-parallel Llama."""
    rows = [{"id": str(number), "question": QUESTION, "solution": "the wind"} for number in range(4)]
    settings = [
        f"teacher.model={inputs.teacher}",
        f"student.model={inputs.student}",
        f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}",
        "prompts.max_prompt_tokens=100",
        "num_steps=2",
    ]
    refused = Command("train", RL_CONFIG, [*SMALL_RL, *settings], tmp_path / "refused").finish()
    assert refused.status == 2
    assert refused.errors.count("\n") == 1
    assert "set reward.lambda_kl=0 to reward r_SS alone" in refused.errors
    assert not (tmp_path / "refused").exists()

    run = tmp_path / "run"
    attempt = Command("train", RL_CONFIG, [*SMALL_RL, *settings, "reward.lambda_kl=0"], run).finish()
    assert attempt.status == 0, attempt.errors
    oracle = TextOracle(inputs.student, opening="<exp> ", bridge=" <sol>", closing="")
    for number, step in enumerate(read_metrics(run), start=1):
        assert all(step[name] is None for name in ("r_kl", "r_kl_mean", "r_kl_max"))
        assert step["advantage_share/r_kl"] == 0.0
        assert step["advantage_share/r_ss"] + step["advantage_share/penalty"] == pytest.approx(1.0)
        assert step["grad_norm"] > 0
        file = run / "completions" / f"step-{number:06d}.parquet"
        completions = list(read_explanations(file, with_tokens=True))
        kept = [row for row in completions if row.explanation_tokens > 0]
        assert step["dropped_completions"] == len(completions) - len(kept) < len(completions)
        for row in kept:
            assert row.kl_per_token is None
            assert row.terms["r_kl"] is None
            penalty = -5.0 if FormatFlag.MISSING_END_TAG in row.flags else 0.0
            expected = oracle.solution_logprobs(QUESTION, row.explanation, " the wind", temperature=row.temperature)
            assert row.reward == pytest.approx(float(expected.mean() + 0.01 * expected.min()) + penalty, abs=1e-5)
