"""What a rank finds out about its own node and GPU: nothing is changed, and no foreign process is ended."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

import torch

from megatron_rlt.disk_faults import free_bytes, refusal

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "vllm", "megatron-rlt")
_WRITTEN_BYTES = 64 << 20
_MAX_USED_BYTES = 1 << 30  # of a GPU that is said to be idle: its driver's own share is below that
_QUERY_SECONDS = 20


@dataclass(frozen=True)
class NodeFacts:
    """What one rank saw. Faults are of its node; a refusal is of the folder, which all nodes share."""

    node: str
    local_rank: int
    versions: dict[str, str]
    faults: tuple[str, ...]
    free_bytes: int
    write_bytes_per_second: float | None  # None: not measured here
    refusal: str | None


def node_facts(node: str, local_rank: int, folder: Path) -> NodeFacts:
    """Look at this node; the first rank of each measures how fast it writes into the run folder."""
    speed, refused = _write_speed(folder) if local_rank == 0 else (None, None)
    faults = _gpu_faults(local_rank) if torch.cuda.is_available() else ()
    return NodeFacts(node, local_rank, _versions(), faults, free_bytes(folder), speed, refused)


def _write_speed(folder: Path) -> tuple[float | None, str | None]:
    """Bytes per second of a file in the folder, or why it cannot be written."""
    block = os.urandom(1 << 20)
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:  # has no name, so a kill leaves nothing
            for _ in range(_WRITTEN_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return None, refusal(error, folder / "file") or f"{folder}: {error}"
    return _WRITTEN_BYTES / (time.monotonic() - started), None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["driver"] = _nvidia_smi("driver_version", 0) or "unknown"
        found["GPU"] = torch.cuda.get_device_name(0)
    return found


def _gpu_faults(local_rank: int) -> tuple[str, ...]:
    if local_rank >= torch.cuda.device_count():
        return (f"has {torch.cuda.device_count()} GPUs, none for local rank {local_rank}",)
    faults = []
    free, total = torch.cuda.mem_get_info(local_rank)
    if total - free > _MAX_USED_BYTES:
        processes = _foreign_processes(local_rank)
        by = f" by {processes}" if processes else ""
        faults.append(f"GPU {local_rank} is not idle: {(total - free) / 1e9:.1f} GB are in use{by}")
    errors = _nvidia_smi("ecc.errors.uncorrected.volatile.total", local_rank)
    if errors.isdigit() and int(errors) > 0:
        faults.append(f"GPU {local_rank} had {errors} uncorrected memory errors")
    return tuple(faults)


def _foreign_processes(gpu: int) -> str:
    lines = _run("nvidia-smi", f"--id={gpu}", "--query-compute-apps=pid,name", "--format=csv,noheader").splitlines()
    others = [line for line in lines if line.partition(",")[0].strip() != str(os.getpid())]
    return "; ".join(f"process {line}" for line in others)


def _nvidia_smi(field: str, gpu: int) -> str:
    return _run("nvidia-smi", f"--id={gpu}", f"--query-gpu={field}", "--format=csv,noheader")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
