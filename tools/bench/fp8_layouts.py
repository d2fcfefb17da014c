"""How far tensor parallelism moves a student's scores: `python -m tools.bench.fp8_layouts EXPLANATIONS --config YAML`.

Scores a few stored explanations of `tools.bench.fp8`, in bfloat16 and in each FP8 recipe, on one rank and on tp CPU
ranks, and adds what it finds to that tool's record. A recipe that the commands refuse for these sizes is measured all
the same, and the refusal is recorded: it says what they are spared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlt.config.folders.description import describe_model
from megatron_rlt.config.fp8 import fp8_faults
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from tools.bench.stored_scores import EXACT, WAYS, Study, build_engine, read_study

_TIMEOUT_SECONDS = 3600
_WAYS = (EXACT, "bf16", "blockwise", "tensorwise", "mxfp8")


def main() -> None:
    arguments = _arguments()
    study = _study(arguments)
    record = json.loads(arguments.out.read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "command": " ".join(["python -m tools.bench.fp8_layouts", *sys.argv[1:]]),
        "tp": arguments.tp,
        "explanations": len(study.rows),
        "scored_tokens": int(study.token_counts.sum()),
        "ways": {},
    }
    whole, split = _on_ranks(arguments, 1), _on_ranks(arguments, arguments.tp)
    for way in _WAYS:
        gap, error = (whole[way] - split[way]).abs(), (whole[way] - whole[EXACT]).abs()
        found["ways"][way] = {
            "gap_mean": float(gap.mean()),
            "gap_max": float(gap.max()),
            "token_error_mean": float(error.mean()),
            "refused": _refusal(study, way, arguments.tp),
        }
        print(way, json.dumps(found["ways"][way]), flush=True)
    record["layouts"] = found
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("explanations", type=Path, help="scored explanations of collect or score")
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of that run")
    parser.add_argument("--student", type=Path, help="model folder; otherwise the one that the rows name")
    parser.add_argument("--tp", type=int, default=3)
    parser.add_argument("--count", type=int, default=16, help="score the first so many explanations")
    parser.add_argument("--pack-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_fp8.json"), help="record to add to")
    return parser.parse_args()


def _study(arguments: argparse.Namespace) -> Study:
    whole = read_study(
        [arguments.explanations], arguments.config, arguments.student, num_groups=None, without_penalties=False
    )
    first = slice(arguments.count)
    return replace(whole, rows=whole.rows[first], groups=whole.groups[first], sequences=whole.sequences[first])


def _on_ranks(arguments: argparse.Namespace, tp: int) -> dict[str, Tensor]:
    """Log-probs `[N]` by way, from tp processes."""
    context = multiprocessing.get_context("spawn")
    answers: Queue[dict[str, list[float]]] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(arguments, tp, rank, port, answers)) for rank in range(tp)]
    for process in ranks:
        process.start()
    found = answers.get(timeout=_TIMEOUT_SECONDS)
    for process in ranks:
        process.join(timeout=60)
    return {way: torch.tensor(values, dtype=torch.float64) for way, values in found.items()}


def _rank(arguments: argparse.Namespace, tp: int, rank: int, port: int, answers: Queue[dict[str, list[float]]]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tp), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_distributed(timeout_seconds=_TIMEOUT_SECONDS)
    study, found = _study(arguments), {}
    for way in _WAYS:
        engine = build_engine(study, way, LayoutConfig(tp=tp), pack_tokens=arguments.pack_tokens)
        found[way] = torch.cat(engine.logprobs(study.sequences).values).tolist()
    stop_distributed()
    if rank == 0:
        answers.put(found)


def _refusal(study: Study, way: str, tp: int) -> str | None:
    """What a command would say to this way at this tp; None: nothing."""
    fp8 = WAYS[way]
    if fp8 is None:
        return None
    shape = describe_model(study.student).architecture
    return next(iter(fp8_faults("student", fp8, shape, dtype="bfloat16", tp=tp, sp=False)), None)


if __name__ == "__main__":
    main()
