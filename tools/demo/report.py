"""The demo's closing tables."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlt.metrics.writer import read_metrics
from tools.demo.chain_arithmetic import Style
from tools.demo.results import NUM_FIRST, NUM_LAST, Accuracy, DemoResults, RlCurves
from tools.demo.stages import SOLVERS, TRACES

_MEANS = {"reward": "reward", "r_ss": "r_SS", "r_kl": "r_KL"}


def print_report(folder: Path, results: DemoResults, console: Console) -> None:
    """Print where the time went, what RLT changed, what that did to students, and where everything lies."""
    run = folder / "rlt"
    console.print(_phases(read_metrics(run)))
    console.print("Wall time: " + "; ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items()))
    gaps = [max(rl.curves["rollout_gap_max"]) for rl in results.rl.values()]
    console.print(f"Largest gap between rollout and trainer log-probs: {max(gaps):.1e}")
    for name, rl in results.rl.items():
        console.print(_before_and_after(rl, title="What RLT changed" if name == "rlt" else "RLT with lambda = 0"))
    console.print(students_table(results))
    if results.solvers:
        console.print(_solvers_table(results))
    console.print(f"Metrics: {run / 'metrics.jsonl'} (TensorBoard: {run / 'tensorboard'})")
    console.print(f"Every completion with all parts of its reward: {run / 'completions'}")
    console.print(f"The trained teacher as a Hugging Face folder: {run / 'hf'}")


def students_table(results: DemoResults) -> Table:
    """Students side by side: what they learned from, and how often they are right on held-out questions."""
    table = Table(title="Fresh students, the same budget: right answers on held-out questions", title_justify="left")
    for column in ("distilled on", "careful traces", "leaps", "greedy", "sampled (T = 1)"):
        table.add_column(column, justify="left" if column == "distilled on" else "right")
    for name, student in results.students.items():
        careful, leap = (student.trace_styles[style.value] for style in (Style.CAREFUL, Style.LEAP))
        table.add_row(
            TRACES[name],
            f"{careful:.0%}",
            f"{leap:.0%}",
            _percent(student.answers.greedy),
            _percent(student.answers.sampled),
        )
    return table


def _solvers_table(results: DemoResults) -> Table:
    table = Table(title="A student's own RL: right answers on held-out questions", title_justify="left")
    for column in ("", "greedy", "sampled (T = 1)"):
        table.add_column(column, justify="right" if column else "left")
    for name, answers in results.solvers.items():
        table.add_row(SOLVERS[name], _percent(answers.greedy), _percent(answers.sampled))
    return table


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} ± {100 * accuracy.standard_error:.1f} %"


def _before_and_after(rl: RlCurves, *, title: str) -> Table:
    num_steps = len(rl.styles)
    table = Table(title=title, title_justify="left")
    for column in ("", f"steps 1-{NUM_FIRST}", f"steps {num_steps - NUM_LAST + 1}-{num_steps}"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in _MEANS.items():
        table.add_row(label, *(f"{value:.3f}" for value in rl.ends(name)))
    table.add_row("well-formed explanations", *(f"{value:.0%}" for value in rl.ends("well_formed_share")))
    for style in Style:
        table.add_row(f"{style.value} explanations", *(f"{share:.0%}" for share in rl.style_ends(style)))
    return table


def _phases(steps: list[dict[str, float]]) -> Table:
    table = Table(title="Where an RL step's time goes", title_justify="left")
    for column in ("phase", "seconds a step (median)", "seconds in all", "tokens/s (median)"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    names = [key.removeprefix("seconds/") for key in steps[-1] if key.startswith("seconds/")]
    for name in sorted(names, key=lambda name: -sum(step[f"seconds/{name}"] for step in steps)):
        seconds = [step[f"seconds/{name}"] for step in steps]
        rates = [step[f"tokens_per_second/{name}"] for step in steps if f"tokens_per_second/{name}" in step]
        rate = f"{statistics.median(rates):,.0f}" if rates else ""
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{sum(seconds):.1f}", rate)
    return table
