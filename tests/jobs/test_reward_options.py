"""Reward options beyond the paper, through `score`: each is recomputed from what is stored for every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.rewards.leaks import leak_metrics
from tests.jobs.tiny_scores import PhaseLog, score_inputs, score_on_ranks
from tests.ranks import run_ranks

ALPHA, LAMBDA_KL, TAG_PENALTY = 0.05, 3.0, -0.25
FORM = {"alpha": ALPHA, "lambda_kl": LAMBDA_KL, "penalties": {"contains_tags": TAG_PENALTY}}
WEIGHTS = {
    "solution_overlap": -2.0,
    "states_the_answer": -0.5,
    "repetition": -0.25,
    "epistemic_per_100_words": 0.125,
}
BOXED = "So the answer is \\boxed{7}."
# Two questions' worth of solutions; a copy, doubt and repetition, a tag inside, and an empty explanation.
TRACES = (
    (BOXED, "So the answer is 7, because three and four are seven."),
    (BOXED, "Wait, perhaps so. Wait, perhaps so. Wait, perhaps so."),
    (BOXED, ""),
    ("the answer is seven", "<|begin_of_solution|> We add one and two."),
    ("the answer is seven", "the answer is seven"),
)
RUNS: Mapping[str, dict[str, Any]] = {
    "paper": {"reward": FORM},
    "leaks": {"reward": FORM | {"leaks": WEIGHTS | {"ngram": 2, "closing_share": 0.1}}},
    "probability": {"reward": FORM | {"solution_unit": "probability"}},
    "gain": {"reward": FORM | {"solution_unit": "gain"}},
    "nothing": {"reward": FORM, "control": "no_explanation"},
}
Rows = list[dict[str, Any]]


def _score(configs: list[ScoreConfig]) -> list[int]:
    return [score_on_ranks(config, PhaseLog()) for config in configs]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """The scored rows by the run's name."""
    folder = tmp_path_factory.mktemp("options")
    inputs = score_inputs(folder, TRACES)
    configs = {name: inputs.config(folder / name, **changes) for name, changes in RUNS.items()}
    assert run_ranks(_score, 1, list(configs.values())) == [[0] * len(configs)]
    return {name: pq.read_table(config.output).to_pylist() for name, config in configs.items()}


def test_leaks_add_their_weighted_sum_to_the_penalty_and_change_no_other_part(rows: dict[str, Rows]) -> None:
    rates = []
    for (solution, explanation), plain, punished in zip(TRACES, rows["paper"], rows["leaks"], strict=True):
        answer = "7" if solution == BOXED else None
        leaks = vars(leak_metrics(explanation, solution, answer=answer, ngram=2, closing_share=0.1))
        expected = plain["penalty"] + sum(weight * leaks[name] for name, weight in WEIGHTS.items())
        assert punished["penalty"] == pytest.approx(expected, abs=1e-12)
        if plain["reward"] is not None:
            expected_reward = punished["r_ss"] - LAMBDA_KL * punished["r_kl"] + punished["penalty"]
            assert punished["reward"] == pytest.approx(expected_reward, abs=1e-12)
        changed = {name for name in plain if plain[name] != punished[name]}
        assert changed <= {"penalty", "reward", "rank", *WEIGHTS}
        assert {name: punished[name] for name in WEIGHTS} == leaks
        rates.append(leaks)
    assert all(len({rate[name] for rate in rates}) > 1 for name in WEIGHTS), "every sign differs among the rows"
    assert [row["penalty"] for row in rows["paper"]] == [0, 0, 0, TAG_PENALTY, 0]


@pytest.mark.parametrize("unit", ["probability", "gain"])
def test_r_ss_in_another_unit_follows_from_the_log_probs_with_and_without_an_explanation(
    unit: str, rows: dict[str, Rows]
) -> None:
    for plain, found, nothing in zip(rows["paper"], rows[unit], rows["nothing"], strict=True):
        values = np.array(plain["student_solution_logprobs"])
        if unit == "gain":
            values = values - np.array(nothing["student_solution_logprobs"])
        mean, worst = values.mean(), values.min()
        if unit == "probability":
            mean, worst = np.exp(mean), np.exp(worst)
        assert found["r_ss"] == pytest.approx(mean + ALPHA * worst, abs=1e-5)
        assert found["r_ss_mean"] == pytest.approx(mean, abs=1e-5)
        assert found["r_ss_min"] == pytest.approx(worst, abs=1e-5)
        changed = {name for name in plain if plain[name] != found[name]}
        assert changed <= {"reward", "rank", "r_ss", "r_ss_mean", "r_ss_min"}
        if plain["reward"] is None:
            assert found["reward"] is None
            continue
        assert abs(found["r_ss"] - plain["r_ss"]) > 1e-3, "the units differ"
        assert found["reward"] == pytest.approx(found["r_ss"] - LAMBDA_KL * found["r_kl"] + found["penalty"], abs=1e-12)


def test_an_empty_explanation_gains_nothing(rows: dict[str, Rows]) -> None:
    gains = [row["r_ss"] for row in rows["gain"]]
    assert [abs(gain) < 1e-5 for gain in gains] == [explanation == "" for _, explanation in TRACES]
