"""Results of `evaluate`: `results.json` and the closing table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.evaluation_sets import EvaluationSet
from megatron_rlt.config.display import NumberTable
from megatron_rlt.metrics.pass_at_k import Estimate
from megatron_rlt.store.run_folder import resume_fixed_values
from megatron_rlt.store.verdicts import VerdictSummary, summarize_verdicts
from megatron_rlt.whole_files import write_text

RESULTS = "results.json"


@dataclass(frozen=True)
class EvaluationResults:
    """Results of an evaluation."""

    kind: str
    summary: VerdictSummary
    rejected: dict[str, int]  # rows by reason


def write_results(
    config: EvaluateConfig, asked: EvaluationSet, fingerprint: str, *, verdicts: Path, rejected: Path
) -> EvaluationResults:
    """Summarize a finished evaluation and write `results.json` atomically."""
    reasons = _reasons(rejected)
    summary = summarize_verdicts(verdicts, num_samples=config.sampling.num_samples)
    results = EvaluationResults(asked.kind, summary, dict(sorted(Counter(reasons).items())))
    text = json.dumps(_record(results, config, fingerprint), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(verdicts.with_name(RESULTS), text + "\n")
    return results


def _reasons(rejected: Path) -> list[str]:
    try:
        return [str(json.loads(line)["reason"]) for line in rejected.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"{rejected} is missing or damaged ({type(error).__name__}: {error}): put back a copy, or remove"
            " verdicts.parquet to evaluate again"
        ) from error


def _record(results: EvaluationResults, config: EvaluateConfig, fingerprint: str) -> dict[str, Any]:
    summary = results.summary
    return {
        **{name: _numbers(estimate) for name, estimate in summary.estimates.items()},
        "questions": summary.num_questions,
        "answers": summary.num_answers,
        "answers_by_reason": summary.reasons,
        "rows_rejected": results.rejected,
        "mean_completion_tokens": summary.mean_tokens,
        "truncated_share": summary.truncated_share,
        "data": config.data,
        "kind": results.kind,
        "model": {"folder": str(config.model.model), "fingerprint": fingerprint},
        "settings": resume_fixed_values(config.model_dump(mode="json")),
    }


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    """JSON has no NaN: the standard error over one question is null."""
    error = estimate.standard_error
    return {"mean": estimate.mean, "standard_error": None if math.isnan(error) else error}


def print_results(
    results: EvaluationResults, config: EvaluateConfig, *, totals: Mapping[str, float], console: Console
) -> None:
    """Print the closing table and the paths of all files; `totals` as in `PartRun`, empty if nothing was left to do."""
    sampling, summary = config.sampling, results.summary
    how = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
    console.print(f"{config.model.model} on {config.data}, {how}", soft_wrap=True, highlight=False, markup=False)
    table = NumberTable("")
    # With one answer per question, avg@1, maj@1 and pass@1 are equal.
    shown = list(summary.estimates.items())[: 1 if sampling.num_samples == 1 else None]
    for name, estimate in shown:
        error = "" if math.isnan(estimate.standard_error) else f" ± {100 * estimate.standard_error:.1f}"
        table.add_line(name, f"{100 * estimate.mean:.1f}{error} %")
    table.add_section()
    table.add_line("questions", f"{summary.num_questions:,}")
    table.add_line("answers", f"{summary.num_answers:,}")
    for reason, count in summary.reasons.items():
        table.add_line(f"  {reason}", f"{count:,}")
    table.add_line("rows rejected", f"{sum(results.rejected.values()):,}")
    for reason, count in results.rejected.items():
        table.add_line(f"  {reason}", f"{count:,}")
    table.add_section()
    table.add_line("mean tokens of an answer", f"{summary.mean_tokens:,.1f}")
    table.add_line("truncated answers", f"{100 * summary.truncated_share:.1f} %")
    if "seconds/rollout" in totals:
        table.add_line("sampled tokens/s", f"{totals['tokens/rollout'] / totals['seconds/rollout']:,.0f}")
    console.print(table)
    folder = config.output_dir
    console.print(f"Every answer with its verdict: {folder / 'verdicts.parquet'}", soft_wrap=True, highlight=False)
    console.print(f"Results: {folder / RESULTS}", soft_wrap=True, highlight=False)
    if results.rejected:
        console.print(f"Rejected rows: {folder / 'rejected.jsonl'}", soft_wrap=True, highlight=False)
