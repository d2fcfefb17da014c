"""Scoring and update passes against the reference's way of scoring: `python -m tools.bench.scoring`.

Every way runs in a process of its own on the same weights and sequences; peak memory is what it held beyond the
loaded weights. `reference` is one sequence at a time through transformers with full log-softmax of all logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_rlt.config.sections import LayoutConfig, OptimizerConfig, ScoringConfig
from megatron_rlt.models.architecture import Architecture
from megatron_rlt.models.build import build_model
from megatron_rlt.models.flops import scoring_flops, update_flops
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.platform import stop_distributed
from megatron_rlt.policy.policy import Policy
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import PackedBatch, SpannedSequence
from tools.bench.machine import matmul_flops_per_second, peak_resident_bytes, resident_bytes
from tools.bench.workload import save_random_model, sequences, start_single_rank

_TEMPERATURE = 0.7
_WAYS = ("reference", "scoring", "update")


@dataclass(frozen=True)
class Measurement:
    """One way's cost on the whole set of sequences."""

    way: str
    seconds: float
    num_tokens: int
    flops: float
    matmul_flops_per_second: float
    extra_bytes: int  # peak beyond what was held when the weights were loaded
    mean_logprob: float  # so that the ways can be seen to agree

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def share_of_peak(self) -> float:
        return self.flops / self.seconds / self.matmul_flops_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 152_064])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(asdict(_measure(arguments))))
        return
    for vocab_size in arguments.vocab:
        _compare(arguments, vocab_size)


def _compare(arguments: argparse.Namespace, vocab_size: int) -> None:
    table = Table(title=f"{arguments.dtype}, hidden {arguments.hidden}, {arguments.layers} layers, vocab {vocab_size}")
    for column in ("way", "tokens/s", "share of matmul rate", "peak beyond weights", "seconds", "mean log-prob"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(
            Path(folder),
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            vocab_size=vocab_size,
            dtype=getattr(torch, arguments.dtype),
        )
        measured = {way: _in_child(arguments, way, folder, vocab_size) for way in _WAYS}
    for way, row in measured.items():
        table.add_row(
            way,
            f"{row.tokens_per_second:,.0f}",
            f"{row.share_of_peak:.0%}",
            f"{row.extra_bytes / 2**20:,.0f} MiB",
            f"{row.seconds:.2f}",
            f"{row.mean_logprob:.4f}",
        )
    Console().print(table)
    scoring, update, reference = measured["scoring"], measured["update"], measured["reference"]
    Console().print(
        f"scoring / reference: {scoring.tokens_per_second / reference.tokens_per_second:.2f}x the tokens/s, "
        f"{scoring.extra_bytes / reference.extra_bytes:.3f} of the memory; "
        f"scoring / update seconds: {scoring.seconds / update.seconds:.2f}\n"
    )


def _in_child(arguments: argparse.Namespace, way: str, folder: str, vocab_size: int) -> Measurement:
    command = [
        sys.executable,
        "-m",
        "tools.bench.scoring",
        "--way",
        way,
        "--folder",
        folder,
        "--dtype",
        arguments.dtype,
    ]
    command += ["--vocab", str(vocab_size), "--sequences", str(arguments.sequences)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Measurement(**json.loads(output.splitlines()[-1]))


def _measure(arguments: argparse.Namespace) -> Measurement:
    dtype = getattr(torch, arguments.dtype)
    architecture = Architecture.from_folder(arguments.folder)
    made = sequences(count=arguments.sequences, shortest=200, longest=2000, vocab_size=architecture.vocab_size)
    work, before = _prepare(arguments.way, arguments.folder, architecture, dtype)
    work(made[:1])  # warm-up: allocations and kernels
    start = time.perf_counter()
    mean_logprob = work(made)
    seconds = time.perf_counter() - start
    extra = peak_resident_bytes() - before  # before the rate is measured: its matrices are not the way's
    flops = update_flops if arguments.way == "update" else scoring_flops
    return Measurement(
        way=arguments.way,
        seconds=seconds,
        num_tokens=sum(len(one) for one in made),
        flops=flops(architecture, made),
        matmul_flops_per_second=matmul_flops_per_second(dtype),
        extra_bytes=extra,
        mean_logprob=mean_logprob,
    )


def _prepare(
    way: str, folder: Path, architecture: Architecture, dtype: torch.dtype
) -> tuple[Callable[[list[SpannedSequence]], float], int]:
    """The way as a callable that returns the mean log-prob, and the memory held once its weights are loaded."""
    if way == "reference":
        return _reference_way(folder, dtype)
    start_single_rank()
    layout = build_layout(LayoutConfig())
    model = build_model(architecture, layout, dtype=dtype, recompute="none")
    load_hf_weights(model, architecture, folder, layout)
    before = resident_bytes()
    return (_scoring_way if way == "scoring" else _update_way)(model, layout), before


def _reference_way(folder: Path, dtype: torch.dtype) -> tuple[Callable[[list[SpannedSequence]], float], int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    sum(float(parameter.detach().float().sum()) for parameter in model.parameters())  # weights are mapped lazily
    before = resident_bytes()

    @torch.no_grad()
    def score(made: list[SpannedSequence]) -> float:
        parts = []
        for one in made:
            logprobs = (model(one.token_ids[None]).logits[0, :-1] / _TEMPERATURE).log_softmax(-1)
            gathered = logprobs.gather(1, one.token_ids[1:, None])[:, 0]
            parts.append(gathered[one.target_positions - 1].float())
        return float(torch.cat(parts).mean())

    return score, before


def _scoring_way(model: LanguageModel, layout: Layout) -> Callable[[list[SpannedSequence]], float]:
    settings = ScoringConfig()
    engine = LogprobEngine(
        model,
        layout,
        temperature=_TEMPERATURE,
        max_tokens_per_pack=4096,
        row_block=settings.row_block,
        vocab_block=settings.vocab_block,
    )
    return lambda made: float(torch.cat(engine.logprobs(made).values).mean())


def _update_way(model: LanguageModel, layout: Layout) -> Callable[[list[SpannedSequence]], float]:
    policy = Policy(
        model,
        layout,
        optimizer=OptimizerConfig(lr=1e-12),
        blocks=ScoringConfig(),
        temperature=_TEMPERATURE,
        micro_batch_size=2,
        num_updates=10,
    )

    def update(made: list[SpannedSequence]) -> float:
        num_rows = sum(one.num_targets for one in made)

        def loss(_: PackedBatch, logprobs: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, float]:
            return -logprobs.sum() / num_rows, float(logprobs.detach().sum())

        return sum(policy.update(made, loss).records) / num_rows

    return update


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        stop_distributed()
