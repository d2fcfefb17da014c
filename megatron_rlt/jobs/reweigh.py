"""`megatron-rlt reweigh`: stored rewards computed again with other settings, without a model and in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from megatron_rlt.config.commands.reweigh import ReweighConfig
from megatron_rlt.config.loading import with_changes
from megatron_rlt.config.sections import LeakConfig, RewardConfig
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.rewards.ranking import RankingChange, compare_rankings, ranks_within
from megatron_rlt.rewards.rlt import penalty_table, rlt_reward, solution_score, with_solution_score
from megatron_rlt.store.reweighed import ReweighedRow, write_reweighed
from megatron_rlt.store.stored_rewards import StoredReward, StoredRewards, open_stored_rewards
from megatron_rlt.types import RewardParts

_TOLERANCE = 1e-6  # stored values are those the reward was computed from, so only other code could give another one


_NO_TOKENS = torch.empty(0)


def run_reweigh(config: ReweighConfig) -> None:
    """Compute all rewards of the source again, print what changed, and write them if an output is asked for.

    Raises:
        ValueError: the source holds no rewards, not what the settings need, or rewards that do not follow from it.
    """
    source = open_stored_rewards(config.source)
    settings = with_changes(source.settings, config.reward)
    stored = source.settings.kl_estimator
    if settings.kl_estimator == "full" and stored != "full":
        raise ValueError(
            f"reward.kl_estimator=full: {config.source} holds the per-token KL of {stored}, and the sum over the"
            " vocabulary needs both models; run score with reward.kl_estimator=full"
        )
    _check_settings(settings)
    rows = reweighed_rows(source, settings)
    change = compare_rankings(
        [row.question for row in rows], [row.old_reward for row in rows], [_reward(row.parts) for row in rows]
    )
    print_reweighed(rows, change, Console())
    if config.output is not None:
        described = {"source": str(config.source.resolve())} | {
            name: used.model_dump(mode="json") for name, used in (("old", source.settings), ("new", settings))
        }
        write_reweighed(config.output, rows, described)
        Console().print(f"Rewards: {config.output}", soft_wrap=True, highlight=False)


def _check_settings(settings: RewardConfig) -> None:
    """Raise ValueError for what does not follow from an explanation's stored log-probs."""
    if settings.solution_unit == "gain":
        raise ValueError(
            "reward.solution_unit=gain: needs the student's log-probs without an explanation, which are not stored;"
            " run score with reward.solution_unit=gain, or take logprob or probability"
        )
    if settings.leaks != LeakConfig():
        raise ValueError(
            "reward.leaks: is counted in texts, and only log-probs are read here; run score with these weights"
        )


def reweighed_rows(source: StoredRewards, settings: RewardConfig) -> list[ReweighedRow]:
    """Old and new rewards with their ranks, in the source's order; raises as `run_reweigh`."""
    rows = []
    for stored in source:
        _check(stored, source.settings)
        parts = reweighed(stored, settings)
        rows.append(
            ReweighedRow(
                problem_id=stored.problem_id,
                question=stored.question,
                explanation_index=stored.explanation_index,
                old_reward=stored.reward,
                old_rank=None,
                parts=None if parts is None else _without_tokens(parts),
                rank=None,
            )
        )
    questions = [row.question for row in rows]
    old = ranks_within(questions, [row.old_reward for row in rows])
    new = ranks_within(questions, [_reward(row.parts) for row in rows])
    return [replace(row, old_rank=was, rank=now) for row, was, now in zip(rows, old, new, strict=True)]


def reweighed(stored: StoredReward, settings: RewardConfig) -> RewardParts | None:
    """The reward of stored log-probs, by the function that every reward comes from; None where none are stored.

    The settings' estimator is `full` only if the stored KL is. Raises ValueError for a weight on a KL that no one has.
    """
    logprobs = stored.logprobs
    if logprobs is None:
        return None
    if settings.lambda_kl != 0 and not logprobs.one_tokenizer:
        raise ValueError(
            f"reward.lambda_kl={settings.lambda_kl:g}: {stored.problem_id} was scored by a student with another"
            " tokenizer, so it has no KL; keep reward.lambda_kl=0"
        )
    parts = rlt_reward(
        student_explanation_logprobs=logprobs.student_explanation,
        student_solution_logprobs=logprobs.student_solution,
        teacher_explanation_logprobs=logprobs.teacher_explanation,
        explanation_divergence=logprobs.kl_per_token if settings.kl_estimator == "full" else None,
        flags=stored.flags,
        alpha=settings.alpha,
        lambda_kl=settings.lambda_kl,
        kl_estimator=settings.kl_estimator,
        penalties=penalty_table(settings.penalties),
        one_tokenizer=logprobs.one_tokenizer,
    )
    if settings.solution_unit == "logprob":
        return parts
    score = solution_score(
        logprobs.student_solution, baseline_logprobs=None, unit=settings.solution_unit, alpha=settings.alpha
    )
    return with_solution_score(parts, score, lambda_kl=settings.lambda_kl)


def print_reweighed(rows: Sequence[ReweighedRow], change: RankingChange, console: Console) -> None:
    """Print what became of the rewards and of the rankings."""
    old = [row.old_reward for row in rows if row.old_reward is not None]
    new = [row.parts for row in rows if row.parts is not None and row.parts.valid]
    table = Table(title="Rewards computed again", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{len(rows):,}")
    table.add_row("  without a reward", f"{len(rows) - len(new):,}")
    table.add_section()
    table.add_row("old reward, mean", f"{Tally.of(old).mean:.4f}")
    table.add_row("new reward, mean", f"{Tally.of(parts.reward for parts in new).mean:.4f}")
    table.add_row("  r_SS", f"{Tally.of(parts.r_ss for parts in new).mean:.4f}")
    table.add_row("  r_KL", f"{Tally.of(parts.r_kl for parts in new).mean:.4f}")
    table.add_row("  penalty", f"{Tally.of(parts.penalty for parts in new).mean:.4f}")
    table.add_section()
    table.add_row("questions", f"{change.num_questions:,}")
    table.add_row("  with two rewards or more", f"{change.num_with_choice:,}")
    table.add_row("  of these, best explanation changed", f"{change.best_changed:.1%}")
    table.add_row("rank correlation within questions, mean", f"{change.mean_correlation:.4f}")
    console.print(table)


def _check(stored: StoredReward, settings: RewardConfig) -> None:
    """Raise ValueError where the source's own settings do not give the stored reward."""
    again = _reward(reweighed(stored, settings))
    if again is None and stored.reward is None:
        return
    if again is None or stored.reward is None or not math.isclose(again, stored.reward, abs_tol=_TOLERANCE):
        raise ValueError(
            f"source: {stored.problem_id}, explanation {stored.explanation_index}: its log-probs give the reward"
            f" {again}, but {stored.reward} is stored, so more is in it than r_SS, r_KL and penalties; score it anew"
        )


def _reward(parts: RewardParts | None) -> float | None:
    return parts.reward if parts is not None and parts.valid else None


def _without_tokens(parts: RewardParts) -> RewardParts:
    """Without what is per token, so that a whole run's rewards fit in memory."""
    return replace(
        parts,
        kl_per_token=_NO_TOKENS,
        student_solution_logprobs=_NO_TOKENS,
        student_explanation_logprobs=_NO_TOKENS,
        teacher_explanation_logprobs=_NO_TOKENS,
    )
