"""Causal attention of a pack on the CPU, three ways: `python -m tools.bench.attention`.

One call a sequence (what `models.attention` does), one call on sequences padded to the longest, and one call under a
block mask of the square of the pack. They take turns in one process; medians of CPU seconds, and each way's largest gap
to the first. Nested tensors are no contestant: torch has no causal kernel for them on the CPU ("No viable backend").
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_rlt.config.display import NumberTable
from megatron_rlt.models.attention import attend_packed
from tools.bench.machine import describe_machine, peak_resident_bytes, reset_peak_resident_bytes
from tools.bench.workload import lognormal_lengths

Attend = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--longest", type=int, default=1000, help="tokens; the shortest has a tenth")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_attention.json"))
    arguments = parser.parse_args()
    ways: dict[str, Attend] = {"a call a sequence": _calls, "padded to the longest": _padded, "block mask": _block_mask}
    packs = []
    for count in arguments.sequences:
        lengths = lognormal_lengths(count, shortest=arguments.longest // 10, longest=arguments.longest)
        measured = _compare(ways, lengths, arguments)
        Console().print(_table(lengths, measured))
        packs.append({"lengths": list(lengths), "ways": measured})
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.attention", "arguments": given, "machine": describe_machine()}
    arguments.out.write_text(json.dumps(record | {"packs": packs}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(
    ways: dict[str, Attend], lengths: tuple[int, ...], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    boundaries = [0, *itertools.accumulate(lengths)]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, boundaries[-1], arguments.heads, arguments.head_dim)
    outputs = {name: way(q, k, v, boundaries) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0)
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            reset_peak_resident_bytes()
            before, start = peak_resident_bytes(), time.process_time()
            way(q, k, v, boundaries)
            seconds[name].append(time.process_time() - start)
            peaks[name] = max(peaks[name], peak_resident_bytes() - before)
    first, *_ = outputs.values()
    return {
        name: {
            "cpu_seconds": round(statistics.median(seconds[name]), 4),
            "extra_bytes": peaks[name],
            "largest_gap": float((output - first).abs().max()),
        }
        for name, output in outputs.items()
    }


def _table(lengths: tuple[int, ...], measured: dict[str, dict[str, float]]) -> NumberTable:
    title = f"{len(lengths)} sequences, {sum(lengths):,} tokens"
    table = NumberTable(title, ("way", "CPU seconds", "memory", "largest gap"))
    for name, facts in measured.items():
        memory = f"{facts['extra_bytes'] / 2**20:,.0f} MiB"
        table.add_line(name, f"{facts['cpu_seconds']:.4f}", memory, f"{facts['largest_gap']:.0e}")
    return table


def _calls(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int]) -> Tensor:
    return attend_packed(query, key, value, boundaries, scale=query.shape[-1] ** -0.5)


def _padded(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int]) -> Tensor:
    lengths = torch.tensor(boundaries).diff().tolist()
    q, k, v = (
        pad_sequence(list(torch.split(part, lengths)), batch_first=True).transpose(1, 2) for part in (query, key, value)
    )
    rows = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def _block_mask(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int]) -> Tensor:
    lengths = torch.tensor(boundaries).diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mask = (owner[:, None] == owner).tril()
    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)


if __name__ == "__main__":
    main()
