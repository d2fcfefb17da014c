"""Scoring against the reference's way of scoring: `python -m tools.bench.scoring`.

The same random weights and the same completions go through transformers one sequence at a time with a full
log-softmax (what the public reference does), through transformers in padded batches of four, and through this
project's scoring pass on one rank, TP2 and DP2. All use the same number of cores. Prints a table a setting and writes
`docs/results/bench_scoring.json`; `--completions 8 --rounds 1` for a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from tools.bench.contest import Result, Way, compete
from tools.bench.machine import describe_machine
from tools.bench.ways import one_at_a_time, padded_batches, scoring
from tools.bench.workload import lognormal_lengths, save_random_model

_REFERENCE, _PADDED, _SCORING = "one at a time", "batches of 4", "scoring"
# (dtype, vocabulary from, against, times its tokens/s at least). Memory: a twentieth of the reference's from 152k on.
_SPEED_TARGETS = (
    ("float32", 152_064, _REFERENCE, 1.5),
    ("float32", 152_064, _PADDED, 2.0),
    ("bfloat16", 152_064, _REFERENCE, 2.2),
    ("float32", 32_000, _REFERENCE, 1.2),
)
_MEMORY_TARGET = 1 / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--longest", type=int, default=2000, help="tokens; the shortest has 100")
    parser.add_argument("--rounds", type=int, default=3, help="every way takes a round in turn; medians are shown")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 152_064])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)), help="threads of every way, over all ranks"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_scoring.json"))
    arguments = parser.parse_args()
    settings = [_measure(arguments, dtype, vocab_size) for dtype in arguments.dtype for vocab_size in arguments.vocab]
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.scoring", "arguments": given, "machine": describe_machine()}
    arguments.out.write_text(json.dumps(record | {"settings": settings}, indent=1) + "\n", encoding="utf-8")


def _measure(arguments: argparse.Namespace, dtype: str, vocab_size: int) -> dict[str, Any]:
    lengths = lognormal_lengths(arguments.completions, shortest=100, longest=arguments.longest)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(
            Path(folder),
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            vocab_size=vocab_size,
            dtype=getattr(torch, dtype),
        )
        results = compete(_ways(Path(folder), dtype, arguments.cores), lengths, rounds=arguments.rounds)
    title = f"{dtype}, vocabulary {vocab_size:,}, hidden {arguments.hidden}, {arguments.layers} layers, "
    title += f"{len(lengths)} completions of {sum(lengths):,} tokens, against '{_REFERENCE}'"
    Console().print(_table(title, results, sum(lengths)))
    measured = {name: _facts(result, results[_REFERENCE], sum(lengths)) for name, result in results.items()}
    targets = _targets(dtype, vocab_size, results)
    for target in targets:
        verdict = {True: ", met", False: ", missed", None: ""}[target.get("met")]
        Console().print(f"{target['claim']}: {target['measured']:.3g}{verdict}")
    return {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "num_tokens": sum(lengths),
        "ways": measured,
        "targets": targets,
    }


def _ways(folder: Path, dtype: str, cores: int) -> list[Way]:
    settings = ScoringConfig(max_tokens_per_pack=2048)
    ours = partial(scoring, folder, dtype, settings=settings)
    return [
        Way(_REFERENCE, partial(one_at_a_time, folder, dtype), num_ranks=1, num_threads=cores),
        Way(_PADDED, partial(padded_batches, folder, dtype, batch_size=4), num_ranks=1, num_threads=cores),
        Way(_SCORING, partial(ours, layout=LayoutConfig()), num_ranks=1, num_threads=cores),
        Way("scoring, TP2", partial(ours, layout=LayoutConfig(tp=2)), num_ranks=2, num_threads=max(cores // 2, 1)),
        Way("scoring, DP2", partial(ours, layout=LayoutConfig()), num_ranks=2, num_threads=max(cores // 2, 1)),
    ]


def _facts(result: Result, reference: Result, num_tokens: int) -> dict[str, float]:
    return {
        "seconds": round(result.seconds, 3),
        "cpu_seconds": round(result.cpu_seconds, 3),
        "tokens_per_second": round(num_tokens / result.seconds, 1),
        "times_the_reference": round(reference.seconds / result.seconds, 3),
        "extra_bytes": result.extra_bytes,
        "share_of_the_reference_memory": round(result.extra_bytes / reference.extra_bytes, 4),
        "largest_gap_to_the_reference": float(abs(result.logprobs - reference.logprobs).max()),
    }


def _table(title: str, results: dict[str, Result], num_tokens: int) -> NumberTable:
    headings = ("way", "tokens/s", "times", "beyond weights", "share", "seconds", "CPU s", "largest gap")
    table = NumberTable(title, headings)
    for name, result in results.items():
        facts = _facts(result, results[_REFERENCE], num_tokens)
        table.add_line(
            name,
            f"{facts['tokens_per_second']:,.0f}",
            f"{facts['times_the_reference']:.2f}",
            f"{result.extra_bytes / 2**20:,.0f} MiB",
            f"{facts['share_of_the_reference_memory']:.3f}",
            f"{result.seconds:.2f}",
            f"{result.cpu_seconds:.2f}",
            f"{facts['largest_gap_to_the_reference']:.1e}",
        )
    return table


def _targets(dtype: str, vocab_size: int, results: dict[str, Result]) -> list[dict[str, Any]]:
    ours = results[_SCORING]
    targets: list[dict[str, Any]] = []
    for target_dtype, target_vocab, against, bound in _SPEED_TARGETS:
        if (dtype, vocab_size) == (target_dtype, target_vocab):
            times = results[against].seconds / ours.seconds
            claim = f"scoring at least {bound} times as fast as {against}"
            targets.append({"claim": claim, "measured": round(times, 3), "met": times >= bound})
    if vocab_size >= 152_064:
        share = ours.extra_bytes / results[_REFERENCE].extra_bytes
        claim = f"scoring in at most {_MEMORY_TARGET} of the memory of {_REFERENCE}"
        targets.append({"claim": claim, "measured": round(share, 4), "met": share <= _MEMORY_TARGET})
    for name in ("scoring, TP2", "scoring, DP2"):
        overhead = results[name].seconds / ours.seconds - 1
        targets.append({"claim": f"overhead of {name}, as a share of one rank's time", "measured": round(overhead, 3)})
    return targets


if __name__ == "__main__":
    main()
