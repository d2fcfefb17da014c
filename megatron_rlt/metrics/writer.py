"""Writes metrics, already reduced over ranks, to `metrics.jsonl`, TensorBoard and Weights & Biases.

`metrics.jsonl` has one line per step, also after a resume. On ranks that do not write, every call does nothing.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlt.disk_faults import writing
from megatron_rlt.parallel.environment import wandb_mode
from megatron_rlt.whole_files import make_folder, write_text

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class _Sink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Sends the metrics of a run to all configured sinks."""

    def __init__(self, folder: Path, *, is_writer: bool, resumed_step: int, tensorboard: bool, wandb: bool) -> None:
        """Open the sinks in the run folder. Raises ValueError if `wandb` is set but its package is not installed.

        `resumed_step` is the last step to keep, 0 for a new run (steps count from 1); later ones will be run again.
        """
        self._sinks: list[_Sink] = []
        if not is_writer:
            return
        make_folder(folder)
        self._sinks.append(JsonLines(folder / METRICS_FILE, resumed_step=resumed_step))
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", resumed_step))
        if wandb:
            self._sinks.append(_WandB(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step once; a non-finite value becomes null in the file."""
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Metrics of all steps of a run, oldest first, without a half-written last line."""
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
            import wandb  # an optional extra
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


class JsonLines:
    """Appends one JSON line per step to a file in which no step appears twice, also after a kill and a resume."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Remove the lines after step `resumed_step`, which will be run again. Raises ValueError for a damaged file."""
        kept = [(line, record) for line, record in complete_lines(path) if record["step"] <= resumed_step]
        if lost := resumed_step - len({record["step"] for _, record in kept}):
            logger.warning("%s lacks %d of the %d steps or parts that are done", path, lost, resumed_step)
        write_text(path, "".join(line for line, _ in kept))
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a step once; a non-finite number becomes null."""
        record = {"step": step} | {name: _finite(value) for name, value in values.items()}
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def complete_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines with their parsed records, oldest first, without a half-written last line.

    Raises ValueError, naming file and line, for a line that is no record of a step.
    """
    if not path.is_file():
        return []
    *lines, _half = path.read_bytes().split(b"\n")
    return [_line_and_record(path, number, line) for number, line in enumerate(lines, start=1)]


def _line_and_record(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        text = f"{line.decode()}\n"
        record = json.loads(text)
    except (ValueError, RecursionError):
        text, record = "", None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(
            f"{path} is damaged: line {number} is no record of a step; remove that line, or put back a copy of the file"
        )
    return text, record


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    return None if isinstance(value, float) and not math.isfinite(value) else value
