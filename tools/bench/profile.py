"""Where the time of one RL step goes, by phase and kind of work: `python -m tools.bench.profile`.

The step of `tools.bench.step` on one rank and one thread, once under torch's profiler, once under Python's for the CPU
platform's share, which also looks at the demo's size, where Python weighs most. Writes
`docs/results/bench_profile.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from megatron_rlt.config.display import NumberTable
from megatron_rlt.jobs.train.rollouts import explain
from megatron_rlt.jobs.train.step import step
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import Phase, PhaseTimer
from megatron_rlt.parallel.platform import stop_distributed
from tools.bench.machine import describe_machine
from tools.bench.step import PROBLEMS, prepare_context
from tools.bench.translation import translation_share
from tools.bench.workload import start_single_rank

# Kinds by parts of the operator's name, the first that matches; what torch did not run is Python and our own code.
_KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "products": ("::mm", "::addmm", "::bmm", "::baddbmm", "mkldnn", "::linear"),
    "copies": ("::copy_", "::cat", "::index", "::gather", "::scatter", "::clone", "::fill_", "::zero_", "::embedding"),
    "exponentials and sums": ("softmax", "logsumexp", "::exp", "::sum", "::max", "::cumsum", "::log", "::mean"),
    "optimizer": ("adam", "_foreach", "::lerp", "::addcdiv", "::addcmul", "::sqrt"),
}
_OTHER, _PYTHON = "other operators", "Python"
_LEAST_SHARE = 0.001  # phases below do not count
_DEMO = {"hidden": 64, "layers": 4, "vocab": 1_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_profile.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with more, an operator's time would be its first thread's
    start_single_rank()
    phases = _profile(arguments)
    Console().print(_table(phases))
    shares = {
        f"hidden {shape.hidden}": _platform_share(shape)
        for shape in (arguments, argparse.Namespace(**(vars(arguments) | _DEMO)))
    }
    Console().print("CPU platform: " + ", ".join(f"{share:.2%} at {name}" for name, share in shares.items()))
    stop_distributed()
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"command": "python -m tools.bench.profile", "arguments": given, "machine": describe_machine()}
    found = {"seconds_by_phase_and_kind": phases, "cpu_platform_share": shares}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")


class ProfiledTimer(PhaseTimer):
    """A phase timer that also holds each phase's seconds by kind of work."""

    def __init__(self) -> None:
        super().__init__(heartbeat=lambda _: None, memory=MemoryLedger())
        self.kinds: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        with torch_profile(activities=[ProfilerActivity.CPU]) as taken, super().phase(name) as phase:
            yield phase
        found = self.kinds.setdefault(name, dict.fromkeys((*_KINDS, _OTHER), 0.0))
        for event in taken.key_averages():
            found[_kind(event.key)] += event.self_cpu_time_total / 1e6


def _kind(operator: str) -> str:
    return next((kind for kind, parts in _KINDS.items() if any(part in operator for part in parts)), _OTHER)


def _profile(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds by phase, then kind. A first step, not looked at, pays for allocations."""
    with tempfile.TemporaryDirectory() as folder:
        context = prepare_context(arguments, Path(folder), arguments.vocab)
        timer = ProfiledTimer()
        for number in range(2):
            timer.kinds.clear()
            step(context, explain(context, PROBLEMS, number, timer), number, timer)
            seconds = {name.partition("/")[2]: value for name, value in timer.take().items() if "seconds/" in name}
    return {
        phase: {
            kind: round(value, 4)
            for kind, value in (timer.kinds[phase] | {_PYTHON: whole - sum(timer.kinds[phase].values())}).items()
        }
        for phase, whole in seconds.items()
        if whole > _LEAST_SHARE * sum(seconds.values())
    }


def _platform_share(shape: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        context = prepare_context(shape, Path(folder), shape.vocab)
        timer = PhaseTimer(heartbeat=lambda _: None, memory=MemoryLedger())
        step(context, explain(context, PROBLEMS, 0, timer), 0, timer)
        return round(translation_share(lambda: step(context, explain(context, PROBLEMS, 1, timer), 1, timer)), 5)


def _table(phases: dict[str, dict[str, float]]) -> NumberTable:
    kinds = [*_KINDS, _OTHER, _PYTHON]
    table = NumberTable("one RL step, one thread: seconds, and shares of each phase", ("phase", "seconds", *kinds))
    for phase, found in phases.items():
        whole = sum(found.values())
        table.add_line(phase, f"{whole:.2f}", *(f"{found[kind] / whole:.0%}" for kind in kinds))
    return table


if __name__ == "__main__":
    main()
