"""The demo's closing tables, from what its runs wrote: metrics, completions and the stages' wall times."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlt.metrics.completions import CompletionStore, read_completions
from megatron_rlt.metrics.writer import read_metrics
from tools.demo.chain_arithmetic import Style, classify

NUM_FIRST, NUM_LAST = 3, 5  # steps whose means stand for before and after; the first is sampled before any update
_MEANS = {"reward": "reward", "r_ss": "r_SS", "r_kl": "r_KL", "well_formed_share": "well-formed explanations"}


def print_report(folder: Path, console: Console) -> None:
    """Print what RLT changed, where the time went, and where everything lies."""
    run = folder / "rlt"
    steps = read_metrics(run)
    questions = _questions(folder / "assets" / "train.jsonl")
    console.print(_before_and_after(run, steps, questions))
    console.print(_phases(steps))
    stages = json.loads((folder / "stages.json").read_text())
    console.print("Wall time: " + "; ".join(f"{title} {seconds:.0f} s" for title, seconds in stages.items()))
    console.print(f"Largest gap between rollout and trainer log-probs: {max(s['rollout_gap_max'] for s in steps):.1e}")
    console.print(f"Metrics: {run / 'metrics.jsonl'} (TensorBoard: {run / 'tensorboard'})")
    console.print(f"Every completion with all parts of its reward: {run / 'completions'}")
    console.print(f"The trained teacher as a Hugging Face folder: {run / 'hf'}")


def style_shares(run: Path, numbers: Sequence[int], questions: dict[str, str]) -> Counter[Style]:
    """Share of each style among the explanations of some steps (counted from 1)."""
    store = CompletionStore(run / "completions")
    rows = [row for number in numbers for row in read_completions(store.path(number))]
    counts = Counter(classify(questions[row.problem_id], row.text) for row in rows)
    return Counter({style: count / len(rows) for style, count in counts.items()})


def _before_and_after(run: Path, steps: list[dict[str, float]], questions: dict[str, str]) -> Table:
    first, last = steps[:NUM_FIRST], steps[-NUM_LAST:]
    table = Table(title="What RLT changed", title_justify="left")
    for column in ("", f"steps 1-{NUM_FIRST}", f"steps {len(steps) - NUM_LAST + 1}-{len(steps)}"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in _MEANS.items():
        before, after = (statistics.fmean(step[name] for step in part) for part in (first, last))
        table.add_row(label, f"{before:.3f}", f"{after:.3f}")
    shares = [style_shares(run, [int(step["step"]) for step in part], questions) for part in (first, last)]
    for style in Style:
        table.add_row(f"{style.value} explanations", *(f"{share[style]:.0%}" for share in shares))
    return table


def _phases(steps: list[dict[str, float]]) -> Table:
    table = Table(title="Where a step's time goes", title_justify="left")
    for column in ("phase", "seconds a step (median)", "seconds in all", "tokens/s (median)"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    names = [key.removeprefix("seconds/") for key in steps[-1] if key.startswith("seconds/")]
    for name in sorted(names, key=lambda name: -sum(step[f"seconds/{name}"] for step in steps)):
        seconds = [step[f"seconds/{name}"] for step in steps]
        rates = [step[f"tokens_per_second/{name}"] for step in steps if f"tokens_per_second/{name}" in step]
        rate = f"{statistics.median(rates):,.0f}" if rates else ""
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{sum(seconds):.1f}", rate)
    return table


def _questions(file: Path) -> dict[str, str]:
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["question"] for row in rows}
