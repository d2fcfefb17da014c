"""The demo's closing tables."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console

from megatron_rlt.config.display import NumberTable
from megatron_rlt.metrics.writer import read_metrics
from tools.accuracy import Accuracy
from tools.demo.chain_arithmetic import Style
from tools.demo.results import DemoResults
from tools.demo.stages import OWN_RL, TRACES
from tools.rl_curves import NUM_FIRST, NUM_LAST, RlCurves

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
    if results.own_rl:
        console.print(_own_rl_table(results))
    console.print(f"Metrics: {run / 'metrics.jsonl'} (TensorBoard: {run / 'tensorboard'})")
    console.print(f"Every completion with all terms of its reward: {run / 'completions'}")
    console.print(f"The trained teacher as a Hugging Face folder: {run / 'hf'}")


def students_table(results: DemoResults) -> NumberTable:
    """Students side by side: what they learned from, and how often they are right on held-out questions."""
    title = "Fresh students, the same budget: right answers on held-out questions"
    table = NumberTable(title, ("distilled on", "careful traces", "leaps", "greedy", "sampled (T = 1)"))
    for name, student in results.students.items():
        careful, leap = (student.trace_styles[style.value] for style in (Style.CAREFUL, Style.LEAP))
        table.add_line(
            TRACES[name],
            f"{careful:.0%}",
            f"{leap:.0%}",
            _percent(student.answers.greedy),
            _percent(student.answers.sampled),
        )
    return table


def _own_rl_table(results: DemoResults) -> NumberTable:
    table = NumberTable("A student's own RL: right answers on held-out questions", ("", "greedy", "sampled (T = 1)"))
    for name, answers in results.own_rl.items():
        table.add_line(OWN_RL[name], _percent(answers.greedy), _percent(answers.sampled))
    return table


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} ± {100 * accuracy.standard_error:.1f} %"


def _before_and_after(rl: RlCurves, *, title: str) -> NumberTable:
    num_steps = len(rl.styles)
    table = NumberTable(title, ("", f"steps 1-{NUM_FIRST}", f"steps {num_steps - NUM_LAST + 1}-{num_steps}"))
    for name, label in _MEANS.items():
        table.add_line(label, *(f"{value:.3f}" for value in rl.ends(name)))
    table.add_line("well-formed explanations", *(f"{value:.0%}" for value in rl.ends("well_formed_share")))
    for style in Style:
        table.add_line(f"{style.value} explanations", *(f"{share:.0%}" for share in rl.style_ends(style)))
    return table


def _phases(steps: list[dict[str, float]]) -> NumberTable:
    headings = ("phase", "seconds per step (median)", "seconds in all", "tokens/s (median)")
    table = NumberTable("Where an RL step's time goes", headings)
    names = [key.removeprefix("seconds/") for key in steps[-1] if key.startswith("seconds/")]
    for name in sorted(names, key=lambda name: -sum(step[f"seconds/{name}"] for step in steps)):
        seconds = [step[f"seconds/{name}"] for step in steps]
        rates = [step[f"tokens_per_second/{name}"] for step in steps if f"tokens_per_second/{name}" in step]
        rate = f"{statistics.median(rates):,.0f}" if rates else ""
        table.add_line(name, f"{statistics.median(seconds):.3f}", f"{sum(seconds):.1f}", rate)
    return table
