"""The embedded sampling engine by group size and width: `python -m tools.bench.decoding --out FILE`.

One question, its whole group, random weights, completions of a fixed length, on one rank. Seconds are CPU seconds of
the process, so that other work on the machine does not count; the matrix-product rate is measured beside every call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.flops import forward_flops
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import stop_distributed
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from tools.bench.machine import describe_machine
from tools.bench.translation import translation_share
from tools.bench.workload import save_random_model, start_single_rank

_LAYERS_AND_IDS = {64: (4, 1_000), 512: (8, 32_000)}


@dataclass(frozen=True)
class Measurement:
    """One call of the engine."""

    hidden_size: int
    group_size: int
    cpu_seconds: float
    tokens_per_second: float
    share_of_matmul_rate: float
    prefill_share: float  # of the engine's own seconds
    translation_share: float  # of the CPU platform's functions, under a profiler that makes them look dearer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", choices=list(_LAYERS_AND_IDS), default=[64, 512])
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_decoding.json"))
    arguments = parser.parse_args()
    start_single_rank()
    rows = [row for hidden_size in arguments.hidden for row in _measure_width(arguments, hidden_size)]
    stop_distributed()
    _print(rows)
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.decoding", "arguments": given, "machine": describe_machine()}
    found = {"threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")


def _measure_width(arguments: argparse.Namespace, hidden_size: int) -> list[Measurement]:
    num_layers, num_ids = _LAYERS_AND_IDS[hidden_size]
    layout = build_layout(LayoutConfig())
    with tempfile.TemporaryDirectory() as name:
        folder = save_random_model(
            Path(name), hidden_size=hidden_size, num_layers=num_layers, vocab_size=num_ids, dtype=torch.float32
        )
        architecture = Architecture.from_folder(folder)
        model = build_model(architecture, layout, dtype=torch.float32, recompute="none")
        load_hf_weights(model, folder)
    engine = MegatronEngine(
        model,
        temperature=0.7,
        top_p=1.0,
        greedy=False,
        num_token_ids=num_ids,
        max_completion_tokens=arguments.tokens,
        max_batch_size=max(arguments.group_size),
        max_prefill_tokens=arguments.prompt,
        stop=lambda _: False,
    )
    prompt = torch.randint(num_ids, (arguments.prompt,), generator=torch.Generator().manual_seed(0))
    engine.generate([SampleRequest(prompt, 0)], 0)  # warm-up: allocations and kernels
    requests = [SampleRequest(prompt, seed) for seed in range(max(arguments.group_size))]
    return [_measure(engine, architecture, requests[:group_size], arguments) for group_size in arguments.group_size]


def _measure(
    engine: MegatronEngine, architecture: Architecture, requests: list[SampleRequest], arguments: argparse.Namespace
) -> Measurement:
    start = time.process_time()
    engine.generate(requests, 0)
    seconds = time.process_time() - start
    work, num_tokens = engine.work, len(requests) * arguments.tokens
    rate = _matmul_rate()
    prompt = forward_flops(architecture, [arguments.prompt], 0)
    whole = forward_flops(architecture, [arguments.prompt + arguments.tokens], arguments.tokens)
    return Measurement(
        hidden_size=architecture.hidden_size,
        group_size=len(requests),
        cpu_seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        share_of_matmul_rate=(prompt + len(requests) * (whole - prompt)) / seconds / rate,
        prefill_share=work.prefill_seconds / (work.prefill_seconds + work.decode_seconds),
        translation_share=translation_share(lambda: engine.generate(requests, 0)),
    )


def _matmul_rate(size: int = 1024, runs: int = 5) -> float:
    """Multiply-adds x 2 for each CPU second of a square product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    left @ right
    start = time.process_time()
    for _ in range(runs):
        left @ right
    return 2 * size**3 * runs / (time.process_time() - start)


def _print(rows: list[Measurement]) -> None:
    headings = ("hidden", "group", "tokens/s", "share of matmul rate", "prefill", "device translation")
    table = NumberTable("embedded engine, one question and its group, float32", headings)
    for row in rows:
        table.add_line(
            str(row.hidden_size),
            str(row.group_size),
            f"{row.tokens_per_second:,.0f}",
            f"{row.share_of_matmul_rate:.0%}",
            f"{row.prefill_share:.1%}",
            f"{row.translation_share:.2%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
