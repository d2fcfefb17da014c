"""Scoring with 7B-shaped layers in bfloat16 and in each FP8 recipe: `python -m tools.gpu.scoring OUT.json`.

Per recipe: tokens/s and share of the peak, seconds of the layers and of the output layer, bytes, how far log-probs are
from bfloat16's, how far pack-mates move them, and whether two equal calls are equal to the bit. `whole_model` puts the
parts together for all 28 layers. Every result is written at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import PAPER_TEMPERATURE, LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.plan import model_plan
from megatron_rlt.metrics.phases import peak_flops_per_second
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.platform import device, device_name
from megatron_rlt.parallel.vocab_logprobs import vocab_parallel_logprobs
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Span, SpannedSequence
from tools.bench.machine import describe_machine
from tools.bench.workload import completions, lognormal_lengths, start_single_rank
from tools.gpu.predicted import predicted_scoring
from tools.gpu.shapes import (
    QWEN_7B,
    median_seconds,
    peak_bytes,
    random_model,
    random_sequences,
    reset_peak,
    with_layers,
)

_WAYS: dict[str, Fp8Config | None] = {
    "bf16": None,
    "blockwise": Fp8Config(),
    "tensorwise": Fp8Config(recipe="tensorwise"),
    "storage": Fp8Config(activations=False),
}
_BLOCKS = ((1024, 1024), (2048, 8192), (4096, 16384), (8192, 32768))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(_WAYS), default=list(_WAYS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a machine without a GPU")
    arguments = parser.parse_args()
    if arguments.dry:
        arguments.length, arguments.tokens, arguments.rounds = 64, 256, 1
    start_single_rank()
    layout = build_layout(LayoutConfig())
    record: dict[str, Any] = {"command": "python -m tools.gpu.scoring", "machine": describe_machine()}
    record |= {"device": device_name(), "arguments": {k: v for k, v in vars(arguments).items() if k != "out"}}
    exact: Tensor | None = None
    for way in arguments.ways:
        facts, values = _measure(_WAYS[way], layout, arguments)
        if exact is None:
            exact = values
        gaps = (values - exact).abs()
        facts["gap"] = {"mean": float(gaps.mean()), "p99": float(gaps.quantile(0.99)), "max": float(gaps.max())}
        record[way] = facts
        _write(arguments.out, record)
        print(way, json.dumps(facts), flush=True)
    record["varied_lengths"] = _varied_lengths(layout, arguments)
    record["output_layer"] = _output_layer(arguments)
    record["whole_model"] = _whole_model(record, arguments)
    _write(arguments.out, record)
    print(json.dumps(record["output_layer"]), json.dumps(record["whole_model"]), sep="\n", flush=True)


def _measure(fp8: Fp8Config | None, layout: Layout, arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    architecture = with_layers(arguments.layers, dry=arguments.dry)
    before = reset_peak()
    model = random_model(architecture, layout, fp8)
    model.requires_grad_(False).eval()
    held = reset_peak() - before
    engine = LogprobEngine(
        model, temperature=PAPER_TEMPERATURE, scoring=ScoringConfig(max_tokens_per_pack=arguments.tokens)
    )
    sequences = random_sequences(arguments.tokens // arguments.length, arguments.length, architecture.vocab_size)
    seconds = median_seconds(lambda: engine.logprobs(sequences), rounds=arguments.rounds)
    peak, flops = peak_flops_per_second(None, device_name()), engine.model_flops(sequences)
    planned = model_plan("model", ModelConfig(model=Path("-"), fp8=fp8), architecture, 1, use="frozen")
    facts = {
        "seconds": seconds,
        "tokens_per_second": arguments.tokens / seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "share_of_bf16_peak": None if peak is None else flops / seconds / peak,
        "layers_seconds": _layers_seconds(engine, sequences, arguments.rounds),
        "weight_bytes": model.weight_bytes,
        "planned_weight_bytes": planned.weight_bytes,
        "allocated_bytes": held,
        "peak_bytes": peak_bytes() - before,
        "predicted_peak_bytes": predicted_scoring(
            architecture,
            fp8,
            num_sequences=len(sequences),
            length=arguments.length,
            pack_tokens=arguments.tokens,
        ),
        "pack_mates_gap": _pack_mates(engine, sequences),
    }
    return facts, torch.cat(engine.logprobs(sequences).values)


def _layers_seconds(engine: LogprobEngine, sequences: list[SpannedSequence], rounds: int) -> float:
    """Seconds of a pass that wants the last token of each sequence only: nearly all of it is the layers."""
    last = [SpannedSequence(one.token_ids, (Span(len(one) - 1, len(one)),)) for one in sequences]
    return median_seconds(lambda: engine.logprobs(last), rounds=rounds)


def _pack_mates(engine: LogprobEngine, sequences: list[SpannedSequence]) -> dict[str, float]:
    """How far the first sequence's log-probs move when it is scored alone, and when all are scored again."""
    alone, together = engine.logprobs(sequences[:1]).values[0], engine.logprobs(sequences).values[0]
    again = engine.logprobs(sequences).values[0]
    gaps = (alone - together).abs()
    return {"mean": float(gaps.mean()), "max": float(gaps.max()), "again": float((again - together).abs().max())}


def _varied_lengths(layout: Layout, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of passes in bfloat16 over packs whose lengths were never seen before, then of the last one again.

    What a new length costs is compilation: cuDNN's graphs depend on it.
    """
    model = random_model(with_layers(arguments.layers, dry=arguments.dry), layout)
    engine = LogprobEngine(
        model, temperature=PAPER_TEMPERATURE, scoring=ScoringConfig(max_tokens_per_pack=arguments.tokens)
    )
    found = {}
    for number in range(4):
        lengths = lognormal_lengths(
            24 + number, shortest=arguments.length // 20 + number, longest=arguments.length + 37 * number
        )
        sequences = completions(lengths, vocab_size=model.unpadded_vocab_size)
        start = perf_counter()
        engine.logprobs(sequences)
        found[f"new lengths {number + 1}"] = perf_counter() - start
    found["the last again"] = median_seconds(lambda: engine.logprobs(sequences), rounds=arguments.rounds)
    return found


def _output_layer(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the output layer over a whole pack, by rows and vocabulary entries of its blocks."""
    architecture = with_layers(1, dry=arguments.dry)
    generator = torch.Generator(device=device()).manual_seed(0)
    shape = {"dtype": torch.bfloat16, "device": device(), "generator": generator}
    hidden = torch.randn(arguments.tokens, architecture.hidden_size, **shape)  # type: ignore[call-overload]
    weight = torch.randn(architecture.vocab_size, architecture.hidden_size, **shape) * 0.02  # type: ignore[call-overload]
    targets = torch.randint(0, architecture.vocab_size, (arguments.tokens,), device=device())

    def seconds(rows: int, entries: int) -> float:
        def work() -> object:
            return vocab_parallel_logprobs(
                hidden,
                weight,
                targets,
                temperature=PAPER_TEMPERATURE,
                vocab_size=architecture.vocab_size,
                tp_group=None,
                row_block=rows,
                vocab_block=entries,
            )

        return median_seconds(work, rounds=arguments.rounds)

    with torch.no_grad():
        return {f"{rows}x{entries}": seconds(rows, entries) for rows, entries in _BLOCKS}


def _whole_model(record: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s and memory of all 28 layers: this many layers' seconds scaled, the rest of the pass as measured."""
    factor = QWEN_7B.num_layers / with_layers(arguments.layers, dry=arguments.dry).num_layers
    found = {}
    for way in arguments.ways:
        facts = record[way]
        layers = facts["layers_seconds"]
        seconds = layers * factor + max(facts["seconds"] - layers, 0.0)
        planned = model_plan("model", ModelConfig(model=Path("-"), fp8=_WAYS[way]), QWEN_7B, 1, use="frozen")
        found[way] = {"tokens_per_second": arguments.tokens / seconds, "planned_weight_bytes": planned.weight_bytes}
    first = found[arguments.ways[0]]
    for facts in found.values():
        facts["speed_against_first"] = facts["tokens_per_second"] / first["tokens_per_second"]
        facts["memory_against_first"] = facts["planned_weight_bytes"] / first["planned_weight_bytes"]
    return found


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
