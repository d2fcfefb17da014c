"""What `score` prints at its end: rewards, rows without one, speed, and where everything lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlt.jobs.run.validate_rows import Survey
from megatron_rlt.store.scores import summarize_scores

_LABELS = {
    "reward": "reward",
    "r_ss": "r_SS",
    "r_ss_mean": "  mean solution token",
    "r_ss_min": "  worst solution token",
    "r_kl": "r_KL",
    "r_kl_mean": "  mean explanation token",
    "r_kl_max": "  worst explanation token",
    "penalty": "penalty",
    "baseline_logprob": "baseline: mean without explanation",
    "gain": "gain by the explanation",
}


def print_scores(
    output: Path, rejected_file: Path, survey: Survey, totals: Mapping[str, float], console: Console
) -> None:
    """Print the closing table.

    Args:
        totals: `seconds/<model>` and `tokens/<model>` of this start.
    """
    summary = summarize_scores(output)
    table = Table(title="Scores: means over the rows with a reward", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows in the output", f"{summary.num_rows:,}")
    for reason, count in sorted(summary.dropped.items()):
        table.add_row(f"  without a reward: {reason}", f"{count:,}")
    table.add_row("rows rejected", f"{len(survey.rejected):,}")
    for reason, count in sorted(survey.counts.items()):
        table.add_row(f"  {reason}", f"{count:,}")
    table.add_section()
    for name, label in _LABELS.items():
        if not math.isnan(summary.means[name]):
            table.add_row(label, f"{summary.means[name]:.4f}")
    table.add_section()
    for flag, count in sorted(summary.flags.items()):
        table.add_row(f"flagged {flag.value}", f"{count:,}")
    table.add_section()
    for model in ("teacher", "student"):
        seconds = totals[f"seconds/{model}"]
        if seconds > 0:  # nothing was left to score if an earlier start ended while it put the parts together
            table.add_row(f"{model}'s tokens/s", f"{totals[f'tokens/{model}'] / seconds:,.0f}")
    console.print(table)
    console.print(f"Scores: {output}", soft_wrap=True, highlight=False)
    if survey.rejected:
        console.print(f"Rejected rows: {rejected_file}", soft_wrap=True, highlight=False)
