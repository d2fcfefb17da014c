"""The demo's picture: what RL did to the teacher, and what that did to the students."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.demo.chain_arithmetic import MODULUS, Style
from tools.demo.results import DemoResults
from tools.demo.stages import TRACES

_COLOURS = {
    Style.CAREFUL: "#2a9d8f",
    Style.SLOPPY: "#e9c46a",
    Style.LEAP: "#e76f51",
    Style.WRONG: "#6d597a",
    Style.RAMBLE: "#b0b7bf",
}
_RUN_TITLES = {"rlt": "lambda = 6", "rlt_lambda0": "lambda = 0"}


def draw(results: DemoResults, file: Path) -> None:
    """Write four panels as one PNG: RL curves, students' losses, styles of their traces, right answers."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    _rl_curves(panels[0][0], results)
    _losses(panels[0][1], results)
    _styles(panels[1][0], results)
    _accuracies(panels[1][1], results)
    figure.savefig(file, dpi=110)


def _rl_curves(axes: Axes, results: DemoResults) -> None:
    for name, run in results.rl.items():
        steps = range(1, len(run.styles) + 1)
        line = "-" if name == "rlt" else "--"
        axes.plot(steps, run.curves["reward"], line, color="#264653", label=f"reward, {_RUN_TITLES[name]}")
        careful = [shares[Style.CAREFUL.value] for shares in run.styles]
        axes.plot(steps, careful, line, color=_COLOURS[Style.CAREFUL], label=f"careful share, {_RUN_TITLES[name]}")
    axes.set(title="RL of the teacher", xlabel="step")
    axes.legend(fontsize=8)


def _losses(axes: Axes, results: DemoResults) -> None:
    for name, student in results.students.items():
        axes.plot(range(1, len(student.loss) + 1), student.loss, label=TRACES[name], linewidth=0.9)
    axes.set(title="Distillation: loss on each student's own rows", xlabel="step", ylabel="nats a token", ylim=(0, 2))
    axes.legend(fontsize=8)


def _styles(axes: Axes, results: DemoResults) -> None:
    names = list(results.students)
    below = [0.0] * len(names)
    for style, colour in _COLOURS.items():
        shares = [results.students[name].trace_styles[style.value] for name in names]
        axes.bar(names, shares, bottom=below, color=colour, label=style.value)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set(title="What the students learn from", ylabel="share of explanations", ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")


def _accuracies(axes: Axes, results: DemoResults) -> None:
    students = results.students.values()
    for offset, how, colour in ((-0.2, "greedy", "#264653"), (0.2, "sampled", "#8ab17d")):
        found = [getattr(student.answers, how) for student in students]
        places = [index + offset for index in range(len(found))]
        errors = [accuracy.standard_error for accuracy in found]
        axes.bar(places, [accuracy.mean for accuracy in found], 0.38, yerr=errors, color=colour, label=how)
    axes.axhline(1 / MODULUS, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set(title="Right answers on held-out questions", ylim=(0, 1))
    axes.set_xticks(range(len(results.students)), list(results.students))
    axes.legend(fontsize=8, loc="upper left")
