"""Planned against measured memory on CPU ranks: `python -m tools.bench.plan`.

Each case is an RL step with random weights in a layout of its own. Prints, per case and phase, the rank on which plan
and measurement differ most, and writes `docs/results/bench_plan.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rlt.config.display import NumberTable
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from tools.bench.machine import describe_machine
from tools.bench.plan_ranks import Case, Found, as_record, measure, model_folder

_TIMEOUT_SECONDS = 900
_MIB = 2**20

CASES = (
    Case("one rank", 1, {}, {}),
    Case("one rank, all recomputed", 1, {"recompute": "full"}, {}),
    Case("one rank, offloaded", 1, {}, {"offload": True}, reference_offload=True),
    Case("one rank, large vocabulary", 1, {}, {}, vocab=48_000, layers=2),
    Case("one rank, Qwen3", 1, {}, {}, family="Qwen3"),
    Case("one rank, 8 layers, small packs", 1, {}, {}, layers=8, max_tokens_per_pack=1024),
    Case("one rank, bfloat16", 1, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    Case("dp 2", 2, {}, {}),
    Case("tp 2", 2, {"layout": {"tp": 2}}, {}),
    Case("tp 2, sp", 2, {"layout": {"tp": 2, "sp": True}}, {"layout": {"tp": 2, "sp": True}}),
    Case("tp 2, sp, all recomputed", 2, {"layout": {"tp": 2, "sp": True}, "recompute": "full"}, {"offload": True}),
    Case("pp 2", 2, {"layout": {"pp": 2}}, {}, max_tokens_per_pack=1024),
    Case("pp 2, student tp 2", 2, {"layout": {"pp": 2}, "recompute": "full"}, {"layout": {"tp": 2}}),
    Case("cp 2", 2, {"layout": {"cp": 2}}, {"layout": {"cp": 2}}),
    Case("tp 2, pp 2, sp", 4, {"layout": {"tp": 2, "pp": 2, "sp": True}}, {"layout": {"tp": 2}}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", help="numbers from 0; without it all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_plan.json"))
    arguments = parser.parse_args()
    chosen = CASES if arguments.cases is None else [CASES[number] for number in arguments.cases]
    record: dict[str, Any] = {"command": "python -m tools.bench.plan", "machine": describe_machine(), "cases": {}}
    table = NumberTable("MiB on the rank that differs most", ("case", "phase", "planned", "measured", "off", "within"))
    for case in chosen:
        found = run_case(case)
        record["cases"][case.name] = as_record(found)
        for same in zip(*found, strict=True):
            worst = max(same, key=lambda one: abs(one.planned - one.measured))
            off = worst.planned / worst.measured - 1
            sizes = (f"{worst.planned / _MIB:,.1f}", f"{worst.measured / _MIB:,.1f}", f"{off:+.1%}")
            table.add_line(case.name, worst.phase, *sizes, "yes" if all(one.within for one in same) else "no")
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        Console().print(f"{case.name}: done", highlight=False)
    Console(width=120).print(table)


def run_case(case: Case) -> list[list[Found]]:
    """What every rank found, in processes of their own."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # libraries on optional packages, at import
    context = multiprocessing.get_context("spawn")
    answers: Queue[tuple[int, list[Found]]] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(case, Path(name))
        ranks = [
            context.Process(target=_rank, args=(case, folder, rank, port, answers)) for rank in range(case.num_ranks)
        ]
        for process in ranks:
            process.start()
        found = dict(answers.get(timeout=_TIMEOUT_SECONDS) for _ in ranks)
        for process in ranks:
            process.join(timeout=60)
    return [found[rank] for rank in range(case.num_ranks)]


def _rank(case: Case, folder: Path, rank: int, port: int, answers: Queue[tuple[int, list[Found]]]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.num_ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_distributed(timeout_seconds=_TIMEOUT_SECONDS)
    found = measure(case, folder)
    stop_distributed()
    answers.put((rank, found))


if __name__ == "__main__":
    main()
