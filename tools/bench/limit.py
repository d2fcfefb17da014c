"""Scoring and update against the machine's own matrix-product rate: `python -m tools.bench.limit`.

A model large enough to be bound by its products (hidden 1,024). The rate is measured before and after the passes, in
the same processes' number of threads; shares are quoted against the faster of the two. Writes
`docs/results/bench_limit.json`; `--completions 4` for a quick look.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.models.flops import forward_flops
from tools.bench.contest import Result, Way, compete
from tools.bench.machine import describe_machine, matmul_flops_per_second
from tools.bench.ways import scoring, update
from tools.bench.workload import completions, lognormal_lengths, save_random_model

# A backward pass does twice the products of a forward pass.
_FORWARDS = {"scoring": 1, "update": 3}
_SHARE_TARGETS = {"scoring": 0.60, "update": 0.45}
_RATIO_TARGET = 0.35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--longest", type=int, default=2000, help="tokens; the shortest has 100")
    parser.add_argument("--rounds", type=int, default=3, help="both passes take a round in turn; medians are shown")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pack-tokens", type=int, default=2048, help="token budget of a scoring pack")
    parser.add_argument("--micro-batch", type=int, default=4, help="completions of a micro-batch of the update")
    parser.add_argument("--sweep", action="store_true", help="also every pair of --blocks as row and vocabulary block")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_limit.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.cores)
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.limit", "arguments": given, "machine": describe_machine()}
    settings = [_measure(arguments, dtype) for dtype in arguments.dtype]
    arguments.out.write_text(json.dumps(record | {"settings": settings}, indent=1) + "\n", encoding="utf-8")


def _measure(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    lengths = lognormal_lengths(arguments.completions, shortest=100, longest=arguments.longest)
    with tempfile.TemporaryDirectory() as name:
        folder = save_random_model(
            Path(name),
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            vocab_size=arguments.vocab,
            dtype=getattr(torch, dtype),
        )
        rates = [_matmul_rate(dtype)]
        results = compete(_ways(arguments, folder, dtype), lengths, rounds=arguments.rounds)
        rates.append(_matmul_rate(dtype))
        num_targets = sum(one.num_targets for one in completions(lengths, vocab_size=arguments.vocab))
        flops = forward_flops(Architecture.from_folder(folder), lengths, num_targets)
    facts = {name: _facts(name, result, flops, sum(lengths), max(rates)) for name, result in results.items()}
    ratio = results["scoring"].seconds / results["update"].seconds
    title = f"{dtype}, vocabulary {arguments.vocab:,}, hidden {arguments.hidden}, {arguments.layers} layers, "
    _print(title + f"{len(lengths)} completions of {sum(lengths):,} tokens", facts, rates, ratio)
    return {
        "dtype": dtype,
        "num_tokens": sum(lengths),
        "matmul_gflops_before_and_after": [round(rate / 1e9, 1) for rate in rates],
        "passes": facts,
        "scoring_over_update": round(ratio, 3),
        "targets_met": {
            **{f"{name} >= {bound:.0%}": facts[name]["share"] >= bound for name, bound in _SHARE_TARGETS.items()},
            f"scoring / update <= {_RATIO_TARGET}": ratio <= _RATIO_TARGET,
        },
    }


def _matmul_rate(dtype: str) -> float:
    # bf16 can be hundreds of times slower than fp32 on processors without bf16 units: a small product tells it, too.
    return matmul_flops_per_second(getattr(torch, dtype), size=2048 if dtype == "float32" else 1024, runs=5)


def _ways(arguments: argparse.Namespace, folder: Path, dtype: str) -> list[Way]:
    one = partial(Way, num_ranks=1, num_threads=arguments.cores)
    settings = ScoringConfig(max_tokens_per_pack=arguments.pack_tokens)
    shared: dict[str, Any] = {"layout": LayoutConfig(), "settings": settings}
    ways = [
        one("scoring", partial(scoring, folder, dtype, **shared)),
        one("update", partial(update, folder, dtype, **shared, micro_batch_size=arguments.micro_batch)),
    ]
    if arguments.sweep:
        for rows, entries in itertools.product(arguments.blocks, repeat=2):
            blocks = settings.model_copy(update={"row_block": rows, "vocab_block": entries})
            prepare = partial(scoring, folder, dtype, layout=LayoutConfig(), settings=blocks)
            ways.append(one(f"scoring, {rows} rows x {entries} entries", prepare))
    return ways


def _facts(name: str, result: Result, flops: float, num_tokens: int, rate: float) -> dict[str, float]:
    work = flops * _FORWARDS[name.partition(",")[0]]
    return {
        "seconds": round(result.seconds, 3),
        "cpu_seconds": round(result.cpu_seconds, 3),
        "tokens_per_second": round(num_tokens / result.seconds, 1),
        "gflops": round(work / result.seconds / 1e9, 1),
        "share": round(work / result.seconds / rate, 3),
        "extra_bytes": result.extra_bytes,
    }


def _print(title: str, facts: dict[str, dict[str, float]], rates: list[float], ratio: float) -> None:
    headings = ("pass", "tokens/s", "GFLOP/s", "share of rate", "beyond weights", "seconds", "CPU s")
    table = NumberTable(title, headings)
    for name, fact in facts.items():
        table.add_line(
            name,
            f"{fact['tokens_per_second']:,.0f}",
            f"{fact['gflops']:,.0f}",
            f"{fact['share']:.0%}",
            f"{fact['extra_bytes'] / 2**20:,.0f} MiB",
            f"{fact['seconds']:.2f}",
            f"{fact['cpu_seconds']:.2f}",
        )
    console = Console()
    console.print(table)
    before, after = (f"{rate / 1e9:,.0f}" for rate in rates)
    console.print(f"scoring / update: {ratio:.2f}; matrix products {before} GFLOP/s before, {after} after\n")


if __name__ == "__main__":
    main()
