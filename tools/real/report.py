"""The closing tables of `make real`, and its page of explanations."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from megatron_rlt.config.display import NumberTable
from tools.accuracy import Accuracy
from tools.real.problems import Style
from tools.real.results import PARTS, STYLE_PARTS, Example, HeldOut, Mean, RealResults
from tools.real.stages import STUDENTS, TEACHERS, UNTAUGHT

_LABELS = {"reward": "reward", "r_ss": "r_SS", "r_kl": "r_KL", "penalty": "penalty", "gain": "gain"}


def print_report(results: RealResults, console: Console) -> None:
    """Print what has run."""
    tables = [_layouts(results), _rl(results), _by_style(results), _held_out(results), _students(results)]
    for table in tables:
        if table.row_count > 0:
            console.print(table)
    console.print("Wall time: " + "; ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items()))


def examples_page(examples: list[Example]) -> str:
    """The explanations of the first held-out questions as Markdown."""
    return "\n".join(line for number, one in enumerate(examples, start=1) for line in _example(number, one))


def _example(number: int, example: Example) -> Iterator[str]:
    yield f"**{number}.** {example.question}"
    yield ""
    yield f"Solution: `{example.solution}`"
    yield ""
    for teacher, explanation in example.explanations.items():
        parts = ", ".join(f"{_LABELS[name]} {value:.2f}" for name, value in example.parts[teacher].items())
        yield f"- {TEACHERS[teacher]}: {parts}"
        yield ""
        yield "  ```text"
        yield from (f"  {line}" for line in explanation.splitlines())
        yield "  ```"
        yield ""


def _layouts(results: RealResults) -> NumberTable:
    headings = ("layout", "between", "tokens", "p99", "max")
    table = NumberTable("Differences of log-probs, nats", headings, text_columns=2)
    for gap in results.layouts:
        table.add_line(gap.layout, gap.between, f"{gap.num_tokens}", f"{gap.p99:.1e}", f"{gap.maximum:.1e}")
    return table


def _rl(results: RealResults) -> NumberTable:
    headings = ("step", "reward", "r_SS", "r_KL", "well formed", "careful", "leap", "gap to sampling")
    table = NumberTable("RLT, step by step", headings)
    curves, all_styles = ({}, []) if results.rl is None else (results.rl.curves, results.rl.styles)
    for step, styles in enumerate(all_styles):
        rewards = (f"{curves[name][step]:.3f}" for name in ("reward", "r_ss", "r_kl"))
        shares = (curves["well_formed_share"][step], styles[Style.CAREFUL.value], styles[Style.LEAP.value])
        gap = f"{curves['rollout_gap_max'][step]:.1e}"
        table.add_line(f"{step + 1}", *rewards, *(f"{share:.0%}" for share in shares), gap)
    return table


def _by_style(results: RealResults) -> NumberTable:
    headings = ("style", "explanations", *STYLE_PARTS)
    table = NumberTable("What RL sampled, all steps", headings)
    for style, found in results.by_style.items():
        table.add_line(style, f"{found.num_explanations}", *(f"{found.means[part]:.2f}" for part in STYLE_PARTS))
    return table


def _held_out(results: RealResults) -> NumberTable:
    table = NumberTable("Held-out explanations", ("", *_LABELS.values(), "careful", "leap", "tokens"))
    for name, found in results.held_out.items():
        table.add_line(TEACHERS[name], *_means(found.parts), *_form(found))
        if found.control:
            table.add_line("  other questions' in their place", *_means(found.control), "", "", "")
    if results.changes:
        table.add_line("change, paired by question", *_means(results.changes), "", "", "")
    return table


def _means(parts: dict[str, Mean]) -> list[str]:
    return [f"{parts[name].mean:.3f} ± {parts[name].standard_error:.3f}" if name in parts else "" for name in PARTS]


def _form(found: HeldOut) -> list[str]:
    shares = (found.styles[style.value] for style in (Style.CAREFUL, Style.LEAP))
    return [*(f"{share:.0%}" for share in shares), f"{found.mean_tokens:.1f}"]


def _students(results: RealResults) -> NumberTable:
    headings = ("distilled on", "careful traces", "leaps", "greedy", "sampled (T = 1)")
    table = NumberTable("Fresh students, the same budget: right answers on held-out questions", headings)
    if results.untaught is not None:
        table.add_line(UNTAUGHT, "", "", _percent(results.untaught), "")
    for name, student in results.students.items():
        shares = (student.trace_styles[style.value] for style in (Style.CAREFUL, Style.LEAP))
        answers = (_percent(student.greedy), _percent(student.sampled))
        table.add_line(STUDENTS[name], *(f"{share:.0%}" for share in shares), *answers)
    return table


def _percent(accuracy: Accuracy | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy.mean:.1f} ± {100 * accuracy.standard_error:.1f} %"
