"""`megatron-rlt reweigh`: recomputes stored rewards with other settings, without a model and in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.loading import with_changes
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.rewards.ranking import RankingChange, compare_rankings, ranks_within
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.rewards.terms import LABELS, TERMS
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations, reward_settings
from megatron_rlt.store.reweighed import COLUMNS, write_reweighed
from megatron_rlt.types import Reward

_TOLERANCE = 1e-6  # the reward is recomputed from the stored values, so only changed code gives another one

Row = dict[str, Any]
"""Cells of one explanation by column, without log-probs, so that a whole run fits in memory."""


def run_reweigh(config: ReweighConfig) -> None:
    """Recompute all rewards of the source, print what changed, and write them if an output is configured.

    Raises ValueError if the source holds no rewards, lacks what the settings need, or its rewards cannot be reproduced.
    """
    files = source_files(config.source)
    try:
        old = reward_settings(files[0])
    except ValueError as error:
        raise ValueError(f"source: {error}") from error
    if old is None:
        raise ValueError(
            f"source: {config.source} was collected without a student and has no rewards; collect with student.model"
        )
    new = with_changes(old, config.reward)
    _check_settings(old, new, config.source)
    rows = reweighed_rows(files, old, new)
    change = compare_rankings(_questions(rows), [row["old_reward"] for row in rows], [row["reward"] for row in rows])
    print_reweighed(rows, change, Console())
    if config.output is not None:
        settings = {name: used.model_dump(mode="json") for name, used in (("old", old), ("new", new))}
        write_reweighed(config.output, rows, tuple(LABELS), {"source": str(config.source.resolve()), **settings})
        Console().print(f"Rewards: {config.output}", soft_wrap=True, highlight=False)


def source_files(source: Path) -> tuple[Path, ...]:
    """Files of a source, in order. Raises ValueError for a folder without any."""
    if not source.is_dir():
        return (source,)
    collected = source / "scored" / "explanations.parquet"
    if collected.is_file():
        raise ValueError(f"source: {source} is a folder of collect; give its file {collected}")
    files = tuple(sorted((source / "completions").glob("step-*.parquet")))
    if not files:
        raise ValueError(
            f"source: {source} is no run folder of `train` with completions/step-N.parquet; train with"
            " metrics.store_completions=true, or give a Parquet file"
        )
    return files


def reweighed_rows(files: Sequence[Path], old: RewardConfig, new: RewardConfig) -> list[Row]:
    """Old and new rewards with their ranks, in the source's order; raises as `run_reweigh`."""
    rows = []
    for file in files:
        for stored in read_explanations(file, with_tokens=True):
            _check(stored, old)
            rows.append(_row(stored, reweighed(stored, old, new)))
    for name in ("reward", "old_reward"):
        ranks = ranks_within(_questions(rows), [row[name] for row in rows])
        for row, rank in zip(rows, ranks, strict=True):
            row[name.replace("reward", "rank")] = rank
    return rows


def reweighed(stored: StoredExplanation, old: RewardConfig, new: RewardConfig) -> Reward | None:
    """Reward under other settings; None if nothing was scored. Raises ValueError if needed values were not stored."""
    evidence = stored.evidence(exact_kl=old.kl_estimator == "full")
    if evidence is None:
        return None
    if new.lambda_kl != 0 and not evidence.one_tokenizer:
        raise ValueError(
            f"reward.lambda_kl={new.lambda_kl:g}: {stored.id} was scored by a student with another tokenizer, so it has"
            " no KL; keep reward.lambda_kl=0"
        )
    if new.solution_unit == "gain" and evidence.baseline_solution_logprobs is None:
        raise ValueError(
            "reward.solution_unit=gain: needs the student's log-probs without an explanation, which are not stored;"
            " run score with baseline=true, or take logprob or probability"
        )
    return rlt_reward(evidence, new)


def print_reweighed(rows: Sequence[Row], change: RankingChange, console: Console) -> None:
    """Print a table of the rewards and the changes in ranking."""
    new = [row for row in rows if row["reward"] is not None]
    table = NumberTable("Rewards computed again")
    table.add_line("rows", f"{len(rows):,}")
    table.add_line("  without a reward", f"{len(rows) - len(new):,}")
    table.add_section()
    was = Tally.of(row["old_reward"] for row in rows if row["old_reward"] is not None)
    table.add_line("old reward, mean", _shown(was.mean))
    labels = {"reward": "new reward, mean", **{term.name: f"  {LABELS[term.name]}" for term in TERMS}}
    for name, label in labels.items():
        mean = Tally.of(math.nan if row[name] is None else row[name] for row in new).mean
        table.add_line(label, _shown(mean))
    table.add_section()
    table.add_line("questions", f"{change.num_questions:,}")
    table.add_line("  with two rewards or more", f"{change.num_with_choice:,}")
    if change.num_with_choice > 0:  # else nothing is ranked
        table.add_line("  of these, best explanation changed", f"{change.best_changed:.1%}")
        table.add_line("rank correlation within questions, mean", _shown(change.mean_correlation))
    console.print(table)


def _shown(value: float) -> str:
    """Four digits; a dash for a mean over nothing."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _check_settings(old: RewardConfig, new: RewardConfig, source: Path) -> None:
    """Raise ValueError for new settings that need values which are not stored."""
    if new.kl_estimator == "full" and old.kl_estimator != "full":
        raise ValueError(
            f"reward.kl_estimator=full: {source} holds the per-token KL of {old.kl_estimator}, and the sum over the"
            " vocabulary needs both models; run score with reward.kl_estimator=full"
        )
    for name in ("ngram", "closing_share"):
        counted, wanted = getattr(old.leaks, name), getattr(new.leaks, name)
        if counted != wanted:
            raise ValueError(
                f"reward.leaks.{name}={wanted}: {source} holds what was counted in texts with {counted}, and only"
                " weights can change; run score with this setting"
            )


def _check(stored: StoredExplanation, settings: RewardConfig) -> None:
    """Raise ValueError where the source's own settings do not give the stored reward."""
    reward = reweighed(stored, settings, settings)
    was = math.nan if stored.reward is None else stored.reward
    again = math.nan if reward is None else reward.total
    if not math.isclose(was, again, abs_tol=_TOLERANCE) and not (math.isnan(was) and math.isnan(again)):
        raise ValueError(
            f"source: {stored.id}, explanation {stored.explanation_index}: its log-probs give the reward {again}, but"
            f" {was} is stored, so more is in it than its terms; score it anew"
        )


def _row(stored: StoredExplanation, reward: Reward | None) -> Row:
    cells = (stored if reward is None else stored.with_reward(reward)).cells()
    return {name: cells.get(name) for name in (*COLUMNS, *LABELS)} | {"old_reward": stored.reward}


def _questions(rows: Sequence[Row]) -> list[tuple[int | None, int]]:
    """Keys of the groups in which explanations are ranked: one question, in training within one step."""
    return [(row["step"], row["question_index"]) for row in rows]
