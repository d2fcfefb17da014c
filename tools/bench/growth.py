"""How scoring and update grow: `python -m tools.bench.growth`.

Time and memory over tokens, vocabulary, group size and ranks (on the same cores: overhead only), each with the exponent
of a power law fitted to it. Then the four corners of vocabulary and tokens: what memory the two take *together* is
left over when each alone is subtracted, and must be nothing. Writes `docs/results/bench_growth.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from tools.bench.contest import Prepared, Round, Way, running
from tools.bench.machine import describe_machine
from tools.bench.ways import scoring, update
from tools.bench.workload import save_random_model

_COMPLETION_TOKENS = 256
_PACK_TOKENS = 4096  # also 16 completions of a micro-batch: both passes see packs of this size
_BASE_VOCAB, _BASE_TOKENS = 8_000, 4096
_TOGETHER_TARGET = 0.01  # of the bytes that logits would take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--vocab", type=int, nargs="+", default=[8_000, 32_000, 152_064])
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--passes", nargs="+", choices=["scoring", "update"], default=["scoring", "update"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_growth.json"))
    arguments = parser.parse_args()
    if len(set(arguments.vocab)) < 2 or min(arguments.tokens) >= _BASE_TOKENS:
        parser.error(f"growth needs two sizes of --vocab, and --tokens that begin below {_BASE_TOKENS}")
    passes = {name: _growth_of(arguments, name) for name in arguments.passes}
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.growth", "arguments": given, "machine": describe_machine()}
    arguments.out.write_text(json.dumps(record | {"passes": passes}, indent=1) + "\n", encoding="utf-8")


def _growth_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    measure = partial(_measure, arguments, name)
    groups = [size * _COMPLETION_TOKENS for size in arguments.group_size]
    few_tokens = min(arguments.tokens)
    by_tokens = measure(_BASE_VOCAB, arguments.tokens, num_ranks=1)
    by_vocab = {vocab: measure(vocab, [few_tokens, _BASE_TOKENS], num_ranks=1) for vocab in arguments.vocab}
    by_ranks = [measure(_BASE_VOCAB, [_BASE_TOKENS], num_ranks=ranks)[0] for ranks in arguments.ranks]
    series = {
        "tokens": _series(arguments.tokens, by_tokens),
        "vocabulary": _series(arguments.vocab, [by_vocab[vocab][1] for vocab in arguments.vocab]),
        "group size": _series(arguments.group_size, measure(_BASE_VOCAB, groups, num_ranks=1)),
        "ranks": _series(arguments.ranks, by_ranks),
    }
    ends = (min(arguments.vocab), max(arguments.vocab))
    corners = {vocab: [one.extra_bytes for one in by_vocab[vocab]] for vocab in ends}
    together = _together(corners, few_tokens=few_tokens, many_tokens=_BASE_TOKENS)
    for title, facts in series.items():
        Console().print(_table(f"{name} over {title}", facts))
    Console().print(
        f"{name}: vocabulary and tokens together take {together['bytes'] / 2**20:,.1f} MiB; logits would take "
        f"{together['logits_bytes'] / 2**20:,.0f} MiB: {'met' if together['met'] else 'missed'}\n"
    )
    return {"series": series, "vocabulary_and_tokens_together": together}


def _measure(
    arguments: argparse.Namespace, name: str, vocab_size: int, tokens: Sequence[int], *, num_ranks: int
) -> list[Round]:
    """One round of medians for each number of tokens, by processes of one model."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_random_model(
            Path(place),
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            vocab_size=vocab_size,
            dtype=torch.float32,
        )
        threads = max(arguments.cores // num_ranks, 1)
        with running(Way(name, _prepare(name, folder), num_ranks=num_ranks, num_threads=threads)) as ask:
            ask([_COMPLETION_TOKENS] * num_ranks)
            return [_median(ask, number, arguments.rounds) for number in tokens]


def _prepare(name: str, folder: Path) -> Callable[[], Prepared]:
    settings = ScoringConfig(max_tokens_per_pack=_PACK_TOKENS)
    shared: dict[str, Any] = {"layout": LayoutConfig(), "settings": settings}
    if name == "scoring":
        return partial(scoring, folder, "float32", **shared)
    return partial(update, folder, "float32", **shared, micro_batch_size=_PACK_TOKENS // _COMPLETION_TOKENS)


def _median(ask: Callable[[Sequence[int]], Round], num_tokens: int, rounds: int) -> Round:
    taken = [ask([_COMPLETION_TOKENS] * (num_tokens // _COMPLETION_TOKENS)) for _ in range(rounds)]
    return Round(
        seconds=statistics.median(one.seconds for one in taken),
        cpu_seconds=statistics.median(one.cpu_seconds for one in taken),
        extra_bytes=max(one.extra_bytes for one in taken),
        logprobs=taken[0].logprobs,
    )


def _series(sizes: Sequence[int], rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "sizes": list(sizes),
        "seconds": [round(one.seconds, 4) for one in rounds],
        "cpu_seconds": [round(one.cpu_seconds, 4) for one in rounds],
        "extra_bytes": [one.extra_bytes for one in rounds],
        "seconds_exponent": round(fitted_exponent(sizes, [one.seconds for one in rounds]), 3),
        "cpu_seconds_exponent": round(fitted_exponent(sizes, [one.cpu_seconds for one in rounds]), 3),
        "extra_bytes_exponent": round(fitted_exponent(sizes, [one.extra_bytes for one in rounds]), 3),
    }


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The `e` of `value = c * size^e`, by least squares on logarithms; nan for fewer than two sizes."""
    if len(sizes) < 2:
        return math.nan
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def _together(corners: dict[int, list[int]], *, few_tokens: int, many_tokens: int) -> dict[str, Any]:
    """What memory takes beyond the sum of what vocabulary and tokens take alone, against logits of that size."""
    (small, (small_few, small_many)), (large, (large_few, large_many)) = sorted(corners.items())
    beyond = (large_many - large_few) - (small_many - small_few)
    logits = 4 * (large - small) * (many_tokens - few_tokens)
    return {"bytes": beyond, "logits_bytes": logits, "met": beyond <= _TOGETHER_TARGET * logits}


def _table(title: str, facts: dict[str, Any]) -> NumberTable:
    table = NumberTable(title, ("size", "seconds", "CPU s", "beyond weights"))
    rows = zip(facts["sizes"], facts["seconds"], facts["cpu_seconds"], facts["extra_bytes"], strict=True)
    for size, seconds, cpu_seconds, extra in rows:
        table.add_line(f"{size:,}", f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{extra / 2**20:,.0f} MiB")
    exponents = (facts[f"{name}_exponent"] for name in ("seconds", "cpu_seconds", "extra_bytes"))
    table.add_line("exponent", *(f"{exponent:.2f}" for exponent in exponents))
    return table


if __name__ == "__main__":
    main()
