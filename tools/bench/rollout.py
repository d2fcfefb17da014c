"""The embedded engine against vLLM, in the same process and as a server: `python -m tools.bench.rollout`.

Needs an environment with vLLM (`make .venv-vllm/.installed`). One rank, random weights, questions with their groups,
completions of a fixed length. Prints start-up, memory, sampled tokens per second and what a weight sync costs, and
writes `docs/results/bench_rollout.json`. Every engine has a process of its own; engines take rounds in turn. With
OMP_NUM_THREADS=1 all have one thread; else a server has one and the others have all cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.jobs.rl.engines import sampling_engine
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.parallel.environment import free_port
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.types import tell_nobody
from tools.bench.machine import describe_machine
from tools.bench.workload import NeverStop, save_random_model, start_single_rank
from tools.demo.tokenizer import save_tokenizer

_SIZES = {"50M": (512, 8), "500M": (1536, 16)}  # hidden size and layers; 32,000 ids
_VOCAB_SIZE = 32_000
# Engine and placement.
_ENGINES = {
    "embedded": ("megatron", "colocated"),
    "vLLM, same process": ("vllm", "colocated"),
    "vLLM, server": ("vllm", "server"),
}


@dataclass(frozen=True)
class Measurement:
    """One engine with one model."""

    size: str
    engine: str
    start_seconds: float  # until it could be asked, without the trainer's own model
    resident_bytes: int  # of all its processes, the trainer's model included
    tokens_per_second: float  # median of the rounds
    sync_seconds: float | None  # median; the embedded engine needs none
    sync_gb_per_second: float | None
    probe_gap: float | None  # largest of all syncs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", choices=list(_SIZES), default=list(_SIZES))
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=200, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of every completion")
    parser.add_argument("--rounds", type=int, default=3, help="each with a weight sync before it; medians are shown")
    parser.add_argument("--alone", action="store_true", help="one engine after the other: less memory, no turns")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_rollout.json"))
    arguments = parser.parse_args()
    rows = [row for size in arguments.size for row in _measure_size(size, arguments)]
    _print(rows)
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.rollout", "arguments": given, "machine": describe_machine()}
    found = {"rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")


def _measure_size(size: str, arguments: argparse.Namespace) -> list[Measurement]:
    hidden_size, num_layers = _SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_random_model(
            folder, hidden_size=hidden_size, num_layers=num_layers, vocab_size=_VOCAB_SIZE, dtype=torch.float32
        )
        save_tokenizer(folder)  # vLLM wants one; no text is ever made
        together = [[engine] for engine in _ENGINES] if arguments.alone else [list(_ENGINES)]
        return [row for engines in together for row in _measure_engines(size, engines, folder, arguments)]


def _measure_engines(size: str, engines: list[str], folder: Path, arguments: argparse.Namespace) -> list[Measurement]:
    """Some engines that live at the same time and take rounds in turn."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, tuple[Any, Connection]] = {}
    for engine in engines:
        here, there = context.Pipe()
        run = folder.parent / engine.replace(" ", "-").replace(",", "")
        side = context.Process(target=_side, args=(there, engine, folder, run, vars(arguments)))
        side.start()
        sides[engine] = (side, here)
        here.recv()  # it is ready: one starts at a time
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in range(arguments.rounds):
        for engine, (_, here) in sides.items():
            here.send("round")
            rounds[engine].append(here.recv())
    found = []
    for engine, (side, here) in sides.items():
        here.send("end")
        found.append(_summary(size, engine, rounds[engine], here.recv()))
        side.join()
    return found


def _side(there: Connection, engine: str, folder: Path, run: Path, given: dict[str, Any]) -> None:
    """One engine: ready, then a round whenever it is told, then what it cost."""
    start_single_rank(port=free_port())
    config = _config(engine, folder, run, given)
    model = load_model(config.teacher, build_layout(LayoutConfig()))
    start = time.perf_counter()
    sampler = sampling_engine(
        config,
        config.teacher,
        model,
        num_token_ids=_VOCAB_SIZE,
        stop=NeverStop(),
        on_progress=tell_nobody,
    )
    start_seconds = time.perf_counter() - start
    requests = _requests(given)
    sampler.generate(requests[:1], policy_version=0)
    sampler.take_metrics()
    there.send("ready")
    version = 0
    while there.recv() == "round":
        version += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        sampler.generate(requests[:1], policy_version=version)
        metrics = sampler.take_metrics()
        begun = time.perf_counter()
        completions = sampler.generate(requests, policy_version=version)
        seconds = time.perf_counter() - begun
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        there.send(metrics | {"tokens_per_second": num_tokens / seconds})
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    there.send({"start_seconds": start_seconds, "resident_bytes": sum(one.memory_info().rss for one in family)})


def _config(engine: str, folder: Path, run: Path, given: dict[str, Any]) -> TrainConfig:
    name, placement = _ENGINES[engine]
    model = {"model": folder, "dtype": "float32"}
    vllm: dict[str, Any] = {} if name == "megatron" else {"placement": placement, "kv_cache_bytes": 2**29}
    rollout = {"engine": name, "max_completion_tokens": given["tokens"], "max_batch_size": 256, "vllm": vllm}
    return TrainConfig.model_validate(
        {
            "output_dir": run,
            "teacher": model,
            "student": model,
            "data": {"path": folder},
            "prompts": {"max_prompt_tokens": given["prompt"]},
            "rollout": rollout,
        }
    )


def _requests(given: dict[str, Any]) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(_VOCAB_SIZE, (given["prompt"],), generator=generator) for _ in range(given["questions"])]
    return [
        SampleRequest(prompt, 1000 * number + member)
        for number, prompt in enumerate(prompts)
        for member in range(given["group_size"])
    ]


def _summary(size: str, engine: str, rounds: list[dict[str, float]], whole: dict[str, float]) -> Measurement:
    def median(name: str) -> float | None:
        values = [one[name] for one in rounds if name in one]
        return statistics.median(values) if values else None

    gaps = [one["weight_sync_probe_gap"] for one in rounds if "weight_sync_probe_gap" in one]
    return Measurement(
        size=size,
        engine=engine,
        start_seconds=whole["start_seconds"],
        resident_bytes=int(whole["resident_bytes"]),
        tokens_per_second=statistics.median(one["tokens_per_second"] for one in rounds),
        sync_seconds=median("weight_sync_seconds"),
        sync_gb_per_second=median("weight_sync_gb_per_second"),
        probe_gap=max(gaps, default=None),
    )


def _print(rows: list[Measurement]) -> None:
    headings = ("model", "engine", "start", "memory", "tokens/s", "times", "weight sync", "GB/s", "probe gap")
    table = NumberTable("sampling engines, one rank, float32", headings, text_columns=2)
    embedded = {row.size: row.tokens_per_second for row in rows if row.engine == "embedded"}
    shown = partial(_shown, missing="")
    for row in rows:
        table.add_line(
            row.size,
            row.engine,
            f"{row.start_seconds:.1f} s",
            f"{row.resident_bytes / 2**30:.2f} GiB",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / embedded[row.size]:.2f}",
            shown(row.sync_seconds, "{:.2f} s"),
            shown(row.sync_gb_per_second, "{:.2f}"),
            shown(row.probe_gap, "{:.1e}"),
        )
    Console().print(table)


def _shown(value: float | None, form: str, *, missing: str) -> str:
    return missing if value is None else form.format(value)


if __name__ == "__main__":
    main()
