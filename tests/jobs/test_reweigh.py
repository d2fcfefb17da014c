"""`reweigh` gives the stored rewards with the settings they have, and those of a fresh run with others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.cli import main
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanations import CompletionStore
from tests.jobs.tiny_collect import collect_inputs, collect_on_ranks, rows_of
from tests.jobs.tiny_completions import completion_of
from tests.jobs.tiny_scores import TRACES, PhaseLog, score_inputs, score_on_ranks
from tests.ranks import run_ranks

OTHER = {"alpha": 0.5, "lambda_kl": 0.25, "kl_estimator": "k3", "penalties": {"empty": -0.5, "contains_tags": -2.0}}
OTHER_WORDS = ("reward.alpha=0.5", "--reward.lambda_kl=0.25", "reward.kl_estimator=k3", "--reward.penalties.empty=-0.5")
GAIN = {"solution_unit": "gain", "leaks": {"repetition": -0.5, "solution_overlap": 0.25}}
GAIN_WORDS = ("reward.solution_unit=gain", "reward.leaks.repetition=-0.5", "reward.leaks.solution_overlap=0.25")
PARTS = ("reward", *LABELS)
EXACT = {"kl_estimator": "full", "lambda_kl": 1.0}


@dataclass(frozen=True)
class Sources:
    """Finished runs."""

    score: ScoreConfig
    score_otherwise: ScoreConfig
    score_exactly: ScoreConfig
    score_gain: ScoreConfig
    score_without_baseline: ScoreConfig
    collect: CollectConfig
    collect_without_student: CollectConfig


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("reweigh")
    (folder / "questions").mkdir()
    inputs, questions = score_inputs(folder), collect_inputs(folder / "questions")
    penalties = {"penalties": {"contains_tags": -2.0}}
    made = Sources(
        inputs.config(folder / "a", reward=penalties),
        inputs.config(folder / "b", reward=OTHER),
        inputs.config(folder / "c", reward=EXACT),
        inputs.config(folder / "f", reward=penalties | GAIN),
        inputs.config(folder / "g", baseline=False),
        questions.config(folder / "d", reward={"lambda_kl": 0.5}),
        questions.config(folder / "e", student=None, scoring={}),
    )
    run_ranks(_make, 1, made)
    return made


def _make(made: Sources) -> None:
    scores = (made.score, made.score_otherwise, made.score_exactly, made.score_gain, made.score_without_baseline)
    for score in scores:
        assert score_on_ranks(score, PhaseLog()) == 0
    for collect in (made.collect, made.collect_without_student):
        assert collect_on_ranks(collect)[0] == 0


def _collected(config: CollectConfig) -> Path:
    return config.output_dir / "scored" / "explanations.parquet"


def _rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def _reweighed(source: Path, output: Path, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    assert main(["reweigh", str(source), str(output), *words]) == 0
    return _rows(output)


def _parts(rows: Sequence[dict[str, Any]]) -> list[list[float | None]]:
    return [[row[name] for name in PARTS] for row in rows]


def test_the_settings_of_the_source_give_the_stored_reward_bit_for_bit(sources: Sources, tmp_path: Path) -> None:
    files = (sources.score.output, sources.score_exactly.output, _collected(sources.collect))
    for number, file in enumerate(files):
        stored, again = _rows(file), _reweighed(file, tmp_path / f"{number}.parquet")
        assert _parts(again) == _parts(stored)
        assert [row["old_reward"] for row in again] == [row["reward"] for row in stored]
        assert [row["rank"] for row in again] == [row["old_rank"] for row in again]
        assert [row["id"] for row in again] == [row["id"] for row in stored]


def test_other_settings_give_what_a_fresh_run_with_them_gives(sources: Sources, tmp_path: Path) -> None:
    """What is not named stays the source's: its price for tags is none of the defaults."""
    fresh = _rows(sources.score_otherwise.output)
    again = _reweighed(sources.score.output, tmp_path / "new.parquet", OTHER_WORDS)
    assert _parts(again) == _parts(fresh)
    assert [row["old_reward"] for row in again] == [row["reward"] for row in _rows(sources.score.output)]
    assert any(row["reward"] != row["old_reward"] for row in again)


def test_the_unit_of_r_ss_may_change(sources: Sources, tmp_path: Path) -> None:
    """exp(mean) + alpha * exp(min) of the stored log-probs, with the source's own lambda, penalties and alpha."""
    stored = _rows(sources.score.output)
    again = _reweighed(sources.score.output, tmp_path / "new.parquet", ["reward.solution_unit=probability"])
    alpha = sources.score.reward.alpha
    with_reward = [pair for pair in zip(stored, again, strict=True) if pair[0]["reward"] is not None]
    assert with_reward
    for old, new in with_reward:
        r_ss = math.exp(old["r_ss_mean"]) + alpha * math.exp(old["r_ss_min"])
        assert new["r_ss"] == pytest.approx(r_ss, abs=1e-9)
        assert new["reward"] == pytest.approx(old["reward"] - old["r_ss"] + r_ss, abs=1e-9)


def test_the_gain_and_other_weights_of_leaks_follow_from_what_is_stored(sources: Sources, tmp_path: Path) -> None:
    """What a fresh run with them gives: `score` stores the baseline and the signs."""
    again = _reweighed(sources.score.output, tmp_path / "new.parquet", GAIN_WORDS)
    assert _parts(again) == _parts(_rows(sources.score_gain.output))
    punished = [row for row in _rows(sources.score.output) if row["repetition"] > 0]
    assert punished, "otherwise the weight of repetition is not seen"


def test_the_exact_divergence_serves_other_coefficients_and_the_sampled_estimators(
    sources: Sources, tmp_path: Path
) -> None:
    stored = _rows(sources.score_exactly.output)
    again = _reweighed(sources.score_exactly.output, tmp_path / "exact.parquet", ["reward.lambda_kl=2.0"])
    for old, new in zip(stored, again, strict=True):
        if old["reward"] is not None:
            assert new["reward"] == pytest.approx(old["r_ss"] - 2.0 * old["r_kl"] + old["penalty"], abs=1e-12)
    words = [*OTHER_WORDS, "reward.penalties.contains_tags=-2.0"]
    sampled = _reweighed(sources.score_exactly.output, tmp_path / "sampled.parquet", words)
    assert _parts(sampled) == _parts(_rows(sources.score_otherwise.output))


def test_ranks_are_those_of_a_question(sources: Sources, tmp_path: Path) -> None:
    """All rows of `score` here ask the same; `collect` has three explanations of each question."""
    rows = _reweighed(sources.score.output, tmp_path / "score.parquet", ["reward.lambda_kl=0"])
    rewards = [row["reward"] for row in rows]
    places = sorted((n for n, reward in enumerate(rewards) if reward is not None), key=lambda n: -rewards[n])
    assert [rows[number]["rank"] for number in places] == list(range(1, len(TRACES)))
    assert [row["rank"] for row in rows if row["reward"] is None] == [None]
    assert [row["explanation_index"] for row in rows] == list(range(len(TRACES)))

    collected = _reweighed(_collected(sources.collect), tmp_path / "collect.parquet", ["reward.lambda_kl=5"])
    stored = rows_of(sources.collect)
    for start in range(0, len(stored), 3):
        group = collected[start : start + 3]
        assert len({row["question"] for row in group}) == 1
        of_reward = sorted((row["reward"] for row in group if row["reward"] is not None), reverse=True)
        for row in group:
            assert row["rank"] == (None if row["reward"] is None else of_reward.index(row["reward"]) + 1)


def _run_folder(folder: Path) -> TrainConfig:
    """What `train` leaves of two steps of two questions with four explanations each."""
    config = TrainConfig.model_validate(
        {
            "output_dir": folder,
            "teacher": {"model": "teacher"},
            "student": {"model": "student"},
            "data": {"path": "rows.jsonl"},
            "reward": {"lambda_kl": 1.5, "kl_estimator": "k3"},
        }
    )
    store = CompletionStore(
        folder / "completions", terms=tuple(LABELS), reward=config.reward.of_one_explanation, is_writer=True
    )
    for step in (1, 2):
        store.write_step(step, [completion_of(index, config) for index in range(8 * step - 8, 8 * step)])
    return config


def test_a_run_folder_gives_all_its_steps_and_the_policy_is_the_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = _run_folder(folder)
    other = config.model_copy(update={"reward": config.reward.model_copy(update={"lambda_kl": 0.0, "alpha": 1.0})})
    rows = _reweighed(folder, tmp_path / "same.parquet")
    changed = _reweighed(folder, tmp_path / "new.parquet", ["reward.lambda_kl=0.0", "reward.alpha=1.0"])
    for index, (row, new) in enumerate(zip(rows, changed, strict=True)):
        expected = [completion_of(index, one).combined.total for one in (config, other)]
        assert [row["old_reward"], new["reward"]] == [None if math.isnan(reward) else reward for reward in expected]
        assert row["reward"] == row["old_reward"]
        assert (row["step"], row["question_index"]) == (1 + index // 8, index // 4 % 2)
    metadata = pq.read_schema(tmp_path / "new.parquet").metadata[b"megatron_rlt.reweigh"]
    assert (json.loads(metadata)["old"]["lambda_kl"], json.loads(metadata)["new"]["lambda_kl"]) == (1.5, 0.0)
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1] for line in lines if len(line) == 2}
    assert (shown["rows"], shown["without a reward"], shown["questions"]) == ("16", "1", "4")
    assert shown["rank correlation within questions, mean"] != "1.0000"


def test_without_an_output_only_the_table_is_printed(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reweigh", str(sources.score.output), "--reward.lambda_kl=1"]) == 0
    assert "of these, best explanation changed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def _refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["reweigh", *(str(word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("megatron-rlt: error: ").strip()


def test_what_cannot_be_reweighed_is_refused_with_one_line(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = sources.score.output
    assert _refusal(capsys, scores, "reward.kl_estimator=full").endswith(
        "needs both models; run score with reward.kl_estimator=full"
    )
    no_baseline = sources.score_without_baseline.output
    assert " which are not stored; run score with " in _refusal(capsys, no_baseline, "reward.solution_unit=gain")
    assert " what was counted in texts with 4, " in _refusal(capsys, scores, "reward.leaks.ngram=2")
    assert _refusal(capsys, scores, "--reward.lambda=1").startswith("command line: reward.lambda: unknown key; ")
    assert " is a folder of collect; give its file " in _refusal(capsys, sources.collect.output_dir)
    assert " is no run folder of `train` " in _refusal(capsys, sources.score.output_dir)
    unscored = next(sources.collect_without_student.output_dir.rglob("explanations.parquet"))
    assert " was collected without a student and has no rewards; " in _refusal(capsys, unscored)
    assert " is no readable Parquet file; " in _refusal(capsys, sources.score.input)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    assert " was not written by score, collect or train; " in _refusal(capsys, tmp_path / "other.parquet")
    assert "exists, and nothing is overwritten; " in _refusal(capsys, scores, tmp_path / "other.parquet")
    assert " does not exist; " in _refusal(capsys, tmp_path / "gone.parquet")
    pq.write_table(pa.table({"id": ["a"], "student_solution_logprobs": [[0.5]]}), tmp_path / "earlier.parquet")
    refused = _refusal(capsys, tmp_path / "earlier.parquet")
    assert refused.startswith(f"source: {tmp_path}/earlier.parquet was written by another version of megatron_rlt, ")


def test_a_stored_reward_that_its_log_probs_do_not_give_is_refused(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(sources.score.output)
    rewards = table["reward"].to_pylist()
    rewards[3] += 0.5
    place = table.column_names.index("reward")
    changed = table.set_column(place, "reward", pa.array(rewards)).cast(table.schema)
    pq.write_table(changed, tmp_path / "more.parquet")
    refused = _refusal(capsys, tmp_path / "more.parquet")
    assert refused.startswith("source: row 3, explanation 3: its log-probs give the reward ")
    assert refused.endswith("so more is in it than its terms; score it anew")
