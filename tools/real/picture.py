"""The picture of `make real`: the RL curve, its parts, styles of explanations, right answers of students."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.real.problems import Style
from tools.real.results import RealResults
from tools.real.stages import STUDENTS, TEACHERS

_DARK, _LIGHT = "#264653", "#8ab17d"
_COLOURS = {Style.CAREFUL: "#2a9d8f", Style.SLOPPY: "#e9c46a", Style.LEAP: "#e76f51"}


def draw(results: RealResults, file: Path) -> None:
    """Write four panels as one PNG; a panel whose stages have not run is empty."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    _rewards(panels[0][0], results)
    _styles(panels[0][1], results)
    _held_out(panels[1][0], results)
    _answers(panels[1][1], results)
    figure.savefig(file, dpi=110)


def _rewards(axes: Axes, results: RealResults) -> None:
    axes.set(title="RL of the teacher: training questions", xlabel="step", ylabel="nats")
    if results.rl is None:
        return
    steps = range(1, len(results.rl.styles) + 1)
    for name, label, colour in (("reward", "reward", _DARK), ("r_ss", "r_SS", _LIGHT), ("r_kl", "r_KL", "#e76f51")):
        axes.plot(steps, results.rl.curves[name], "-o", markersize=3, color=colour, label=label)
    axes.legend(fontsize=8)


def _styles(axes: Axes, results: RealResults) -> None:
    axes.set(title="Styles of its explanations", xlabel="step", ylabel="share", ylim=(0, 1))
    if results.rl is None:
        return
    steps = range(1, len(results.rl.styles) + 1)
    for style, colour in _COLOURS.items():
        shares = [of_step[style.value] for of_step in results.rl.styles]
        axes.plot(steps, shares, "-o", markersize=3, color=colour, label=style.value)
    axes.legend(fontsize=8)


def _held_out(axes: Axes, results: RealResults) -> None:
    """Of the control r_SS alone: r_KL of tokens that the teacher did not sample is no divergence."""
    axes.set(title="Held-out questions", ylabel="nats", xlim=(-0.5, len(TEACHERS) - 0.5))
    for index, found in enumerate(results.held_out.values()):
        sides = [(found.parts["reward"], -0.27, _DARK, "reward"), (found.parts["r_ss"], 0.0, _LIGHT, "r_SS")]
        if found.control:
            sides.append((found.control["r_ss"], 0.27, "#b0b7bf", "r_SS with another question's explanation"))
        for one, offset, colour, label in sides:
            shown = label if index == 0 else None
            axes.bar(index + offset, one.mean, 0.25, yerr=one.standard_error, color=colour, label=shown)
    axes.set_xticks(range(len(results.held_out)), [TEACHERS[name] for name in results.held_out])
    if results.held_out:
        axes.legend(fontsize=8, loc="lower right")


def _answers(axes: Axes, results: RealResults) -> None:
    axes.set_visible(bool(results.students))
    axes.set(title="Students distilled on: right answers on held-out questions")
    for offset, how, colour in ((-0.2, "greedy", _DARK), (0.2, "sampled", _LIGHT)):
        found = [getattr(student, how) for student in results.students.values()]
        asked = [(index + offset, one) for index, one in enumerate(found) if one is not None]
        errors = [one.standard_error for _, one in asked]
        axes.bar([at for at, _ in asked], [one.mean for _, one in asked], 0.38, yerr=errors, color=colour, label=how)
    if results.untaught is not None:
        axes.axhline(results.untaught.mean, color="black", linewidth=0.8, linestyle=":", label="before it is distilled")
    axes.set_xticks(range(len(results.students)), [STUDENTS[name] for name in results.students])
    if results.students:
        axes.legend(fontsize=8)
