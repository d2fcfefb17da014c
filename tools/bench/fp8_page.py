"""Tables and picture of docs/fp8.md: `python -m tools.bench.fp8_page docs/results/bench_fp8.json OUT.png`.

Prints what `tools.bench.fp8` and `tools.bench.fp8_layouts` recorded as Markdown, and draws one point per group and
scorer: how far the scorer's errors differ within a group against how far its rewards do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXACT = "float32"

_COLOURS = {
    "bf16": "#264653",
    "storage (W8A16)": "#2a9d8f",
    "blockwise": "#8ab17d",
    "blockwise, power of two": "#e9c46a",
    "mxfp8": "#6d597a",
    "tensorwise": "#e76f51",
}
_LINES = {1.0: "noise = spread", 0.3: "0.3", 0.1: "0.1", 0.03: "0.03"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    print(*_errors(record), "", *_rankings(record), "", *_parts(record), "", *_dependence(record), sep="\n")
    draw(record, arguments.picture)


def _errors(record: dict[str, Any]) -> list[str]:
    headings = ("scorer", "token error: mean (95 %)", "p99", "max", "top-1", "reward noise", "noise / std (95 %)")
    return _table(
        headings,
        [
            (
                way,
                f"{_with_interval(one['token_error'], 3)}",
                f"{one['token_error']['p99']:.2f}",
                f"{one['token_error']['max']:.1f}",
                f"{one['top1_agreement']:.1%}",
                f"{one['reward_noise']:.3f}",
                _with_interval(one["noise_share"], 3),
            )
            for way, one in _inexact(record)
        ],
    )


def _rankings(record: dict[str, Any]) -> list[str]:
    headings = (
        "scorer",
        "Spearman: mean (95 %)",
        "worst group",
        "signs that flip (95 %)",
        "of large advantages",
        "short, long",
    )
    return _table(
        headings,
        [
            (
                way,
                _with_interval(one["spearman"], 3),
                f"{one['spearman']['worst']:.3f}",
                _with_interval(one["sign_flips"], 3),
                _with_interval(one["sign_flips_of_large"], 3),
                f"{one['by_length'][0]['noise']:.3f}, {one['by_length'][-1]['noise']:.3f}",
            )
            for way, one in _inexact(record)
        ],
    )


def _parts(record: dict[str, Any]) -> list[str]:
    names = list(next(_inexact(record))[1]["part_rms_error"])
    rows = [(way, *(f"{one['part_rms_error'][name]:.3f}" for name in names)) for way, one in _inexact(record)]
    return _table(("scorer", *(f"`{name}`" for name in names)), rows)


def _dependence(record: dict[str, Any]) -> list[str]:
    layouts = record.get("layouts")
    headings = ["scorer", "two mates", "random mates"] + ([] if layouts is None else [f"tp {layouts['tp']}"])
    rows = []
    for way, one in _inexact(record):
        row = [way, *(f"{one['pack_mates'][mates]['mean']:.3f}" for mates in ("two mates", "random mates"))]
        if layouts is not None:
            split = layouts["ways"].get(way)
            refused = "" if split is None or split["refused"] is None else " (refused)"
            row.append("" if split is None else f"{split['gap_mean']:.3f}{refused}")
        rows.append(row)
    return _table(headings, rows)


def _inexact(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((way, one) for way, one in record["ways"].items() if way != EXACT)


def _with_interval(figure: dict[str, Any], digits: int) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(line)} |" for line in (headings, *rows)]
    return [lines[0], "|---" * len(headings) + "|", *lines[1:]]


def draw(record: dict[str, Any], file: Path) -> None:
    """Write the picture as PNG or SVG, by the file's name."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ways = {way: record["ways"][way]["by_group"] for way in _COLOURS if way in record["ways"]}
    for way, groups in ways.items():
        axes.scatter(
            groups["spread"], groups["noise"], s=22, color=_COLOURS[way], label=_label(record, way), alpha=0.85
        )
    spreads = [spread for groups in ways.values() for spread in groups["spread"]]
    _draw_shares(axes, min(spreads) / 1.2, max(spreads) * 1.2)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="standard deviation of the exact rewards within a group",
        ylabel="standard deviation of the scorer's error within a group",
        title=f"{record['explanations']} explanations in {record['groups']} groups, emulated FP8"
        if record["emulated"]
        else f"{record['explanations']} explanations in {record['groups']} groups, {record['device']}",
    )
    axes.legend(fontsize=8, title="scorer: mean of noise / spread", title_fontsize=8)
    figure.savefig(file, dpi=110)


def _label(record: dict[str, Any], way: str) -> str:
    return f"{way}: {record['ways'][way]['noise_share']['mean']:.3f}"


def _draw_shares(axes: Axes, low: float, high: float) -> None:
    """Lines of equal noise over spread."""
    for share, name in _LINES.items():
        axes.plot([low, high], [share * low, share * high], color="black", linewidth=0.7, linestyle=":")
        axes.annotate(name, (high, share * high), fontsize=8, ha="right", va="bottom")
    axes.set_xlim(low, high)


if __name__ == "__main__":
    main()
