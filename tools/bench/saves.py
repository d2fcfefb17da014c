"""How long training stands still for a save, and what memory a save takes: `python -m tools.bench.saves`.

Two data-parallel ranks train a random model and save it in each of the four ways of `checkpoint.reshardable` and
`checkpoint.background`, in turn. Prints medians over the rounds, of the slowest or fullest rank, and writes
`docs/results/bench_saves.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import CapturedState, capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import POLICY, SharedState
from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig, Reshardable
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.jobs.sft import sft_update
from megatron_rlt.parallel.environment import free_port
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import group_of_a_thread, start_distributed, stop_distributed, world
from megatron_rlt.policy.policy import Policy
from megatron_rlt.types import SpannedSequence
from tools.bench.machine import describe_machine, held_bytes, peak_resident_bytes, reset_peak_resident_bytes
from tools.bench.workload import completions, save_random_model

_NUM_RANKS = 2
_TIMEOUT_SECONDS = 1800
_STEPS_BEFORE = 2  # without a save, for comparison
_MMAP_THRESHOLD, _THRESHOLD_BYTES = -3, 64 * 1024  # mallopt(3)
_WAYS: tuple[tuple[Reshardable, bool], ...] = (("full", False), ("full", True), ("tp_pp", False), ("tp_pp", True))


@dataclass(frozen=True)
class Save:
    """One save on one rank."""

    reshardable: str
    background: bool
    stalled_seconds: float  # training stood still
    seconds: float  # until the checkpoint was complete
    num_bytes: int
    plain_step_seconds: float  # median of steps without a save
    step_seconds: float  # mean of steps that began while the save was written; plain in the foreground
    peak_bytes: int  # most memory during the save, beyond what was held before
    kept_bytes: int  # of these while training goes on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="receives the checkpoints; a temporary one without it")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_saves.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = _on_ranks(arguments, Path(name))
    given = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")}
    record = {"command": "python -m tools.bench.saves", "arguments": given, "machine": describe_machine()}
    rows = [_median(found, *way) for way in _WAYS]
    _print(rows)
    saves = [[asdict(save) for save in rank] for rank in found]
    content = record | {"rows": [asdict(row) for row in rows], "saves": saves}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _on_ranks(arguments: argparse.Namespace, folder: Path) -> list[list[Save]]:
    model = save_random_model(
        folder / "model",
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        vocab_size=arguments.vocab,
        dtype=torch.float32,
    )
    context = multiprocessing.get_context("spawn")
    answers: Queue[tuple[int, list[Save]]] = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, port, arguments, model, folder, answers))
        for rank in range(_NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=_TIMEOUT_SECONDS) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    return [found[rank] for rank in range(_NUM_RANKS)]


def _rank(
    rank: int,
    port: int,
    arguments: argparse.Namespace,
    model: Path,
    folder: Path,
    answers: Queue[tuple[int, list[Save]]],
) -> None:
    # Large tensors go back to the system when they are freed, so that the process's size is what is alive.
    ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(_NUM_RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_distributed(timeout_seconds=_TIMEOUT_SECONDS)
    training = _Training(model, arguments)
    training.step()  # moments exist from the first update on
    found = [
        training.save(folder / "checkpoints", reshardable, background=background)
        for _ in range(arguments.rounds)
        for reshardable, background in _WAYS
    ]
    stop_distributed()
    answers.put((rank, found))


class _Training:
    def __init__(self, model: Path, arguments: argparse.Namespace) -> None:
        config = ModelConfig(model=model, dtype="float32", layout=LayoutConfig())
        self._policy = Policy(
            load_model(config, build_layout(config.layout)),
            optimizer=OptimizerConfig(lr=1e-4),
            blocks=ScoringConfig(),
            temperature=1.0,
            max_tokens_per_pack=arguments.tokens,
            micro_batch_size=None,
            num_updates=10_000,
        )
        lengths = [arguments.tokens // 4] * 4
        self._sequences: list[SpannedSequence] = completions(lengths, vocab_size=arguments.vocab)
        self._group = group_of_a_thread(timeout_seconds=_TIMEOUT_SECONDS)
        self._step = 0

    def step(self) -> float:
        """One update; its seconds."""
        started = time.perf_counter()
        sft_update(self._policy, self._sequences)
        self._step += 1
        return time.perf_counter() - started

    def save(self, folder: Path, reshardable: Reshardable, *, background: bool) -> Save:
        plain = statistics.median(self.step() for _ in range(_STEPS_BEFORE))
        dist.barrier()
        before = held_bytes()
        reset_peak_resident_bytes()
        started = time.perf_counter()
        captured = self._capture(reshardable, copy=background)
        if not background:
            info = write_training_state(captured, folder, keep_last=1, group=world())
            seconds = stalled = time.perf_counter() - started
            peak, kept, steps = peak_resident_bytes() - before, 0, [plain]
        else:
            write = BackgroundWrite(captured, folder, keep_last=1, group=self._group)
            stalled = time.perf_counter() - started
            peak, kept = peak_resident_bytes() - before, held_bytes() - before
            del captured
            steps = [self.step()]
            while not self._all_ended(write):
                steps.append(self.step())
            info, write_seconds = write.result()
            seconds = stalled + write_seconds
        if dist.get_rank() == 0:
            shutil.rmtree(info.path)
        dist.barrier()
        step = statistics.mean(steps)
        size = info.manifest.num_bytes
        return Save(reshardable, background, stalled, seconds, size, plain, step, max(0, peak), max(0, kept))

    def _all_ended(self, write: BackgroundWrite) -> bool:
        ended = torch.tensor([int(write.has_ended)])
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        return bool(ended)

    def _capture(self, reshardable: Reshardable, *, copy: bool) -> CapturedState:
        return capture_training_state(
            self._step,
            models={POLICY: self._policy.model},
            optimizer=self._policy.optimizer,
            scheduler=self._policy.scheduler,
            rank_state=RankState.capture(extra=b""),
            shared_state=SharedState(b"{}", {}),
            num_updates=self._policy.num_updates,
            reshardable=reshardable,
            copy=copy,
        )


def _median(found: list[list[Save]], reshardable: Reshardable, background: bool) -> Save:
    """Medians over the rounds of the maxima over the ranks."""
    chosen = [[asdict(save) for save in rank] for rank in found]
    rounds = [
        {key: max(save[key] for save in same) for key in same[0] if key not in ("reshardable", "background")}
        for same in zip(*chosen, strict=True)
        if (same[0]["reshardable"], same[0]["background"]) == (reshardable, background)
    ]
    medians: dict[str, Any] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return Save(reshardable, background, **medians)


def _print(rows: list[Save]) -> None:
    headings = (
        "reshardable",
        "background",
        "stands still, s",
        "complete after, s",
        "GB/s",
        "step, s",
        "step meanwhile, s",
    )
    table = NumberTable(
        f"Saves of {rows[0].num_bytes / 1e9:.2f} GB by {_NUM_RANKS} ranks",
        (*headings, "peak, MB", "kept, MB"),
        text_columns=2,
    )
    for row in rows:
        seconds = (row.stalled_seconds, row.seconds, row.num_bytes / 1e9 / row.seconds)
        steps = (row.plain_step_seconds, row.step_seconds)
        memory = (row.peak_bytes / 1e6, row.kept_bytes / 1e6)
        numbers = (*(f"{value:.2f}" for value in (*seconds, *steps)), *(f"{value:,.0f}" for value in memory))
        table.add_line(row.reshardable, "yes" if row.background else "no", *numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
