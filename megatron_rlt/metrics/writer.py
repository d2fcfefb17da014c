"""Writes a step's numbers: one JSON line a step, TensorBoard, and Weights & Biases where asked for.

In: values already reduced over ranks. Out: `metrics.jsonl` in which no step stands twice, also after a resume.
Only one rank writes; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlt.parallel.environment import wandb_mode

METRICS_FILE = "metrics.jsonl"


class _Sink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Where the numbers of a run go."""

    def __init__(self, folder: Path, *, is_writer: bool, resumed_step: int, tensorboard: bool, wandb: bool) -> None:
        """
        Args:
            folder: the run folder.
            is_writer: whether this rank writes.
            resumed_step: last step that is kept, 0 of a new run (steps count from 1); what stands behind it belongs to
                steps that will be done again.

        Raises:
            ValueError: `wandb` is asked for and its package is not installed.
        """
        self._sinks: list[_Sink] = []
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks.append(JsonLines(folder / METRICS_FILE, resumed_step=resumed_step))
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", resumed_step))
        if wandb:
            self._sinks.append(_WandB(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step once; a value that is not finite becomes null in the file."""
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All steps of a run, oldest first. The line a killed run left half is not among them."""
    return [record for _, record in complete_lines(folder / METRICS_FILE)]


class _TensorBoard:
    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and not every run wants it

        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path) -> None:
        try:
            import wandb  # an extra, only for those who ask for it
        except ModuleNotFoundError as error:
            raise ValueError(
                "metrics.wandb=true needs the package wandb, which is not installed: "
                "pip install 'megatron-rlt[wandb]', or set metrics.wandb=false"
            ) from error
        self._run: Any = wandb.init(project="megatron-rlt", name=folder.name, dir=str(folder), mode=wandb_mode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# A file of one JSON line a step in which no step stands twice, also after a kill and a resume.
class JsonLines:
    """Appends records with a `step`. What stands behind the last step that is kept is removed at the beginning."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Args: resumed_step: last step that is kept; what stands behind it will be done again."""
        kept = [line for line, record in complete_lines(path) if record["step"] <= resumed_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a step once; a number that is not finite becomes null."""
        record = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def complete_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines with their records, oldest first. The line a killed run left half is not among them."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(line, json.loads(line)) for line in lines if line.endswith("}\n")]


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    return None if isinstance(value, float) and not math.isfinite(value) else value
