"""Where checkpoints of a run lie: `step-000007` below one folder, complete or not there at all.

Everything is written under a hidden temporary name and renamed when complete. Leftovers of a killed run keep the
temporary name; they are ignored and swept at the next save.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.checkpoint.manifest import Manifest, find_fault, sync_folder

_STEP_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """One complete checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def temporary_folder(folder: Path, step: int) -> Path:
    return folder / f".step-{step:06d}.tmp"


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def sweep_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def keep_newest(folder: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints. A removal that is interrupted leaves no half of a checkpoint."""
    for path in list_checkpoints(folder)[:-keep_last]:
        doomed = path.with_name(f".{path.name}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)
    sync_folder(folder)


def find_resumable(folder: Path, *, group: dist.ProcessGroup | None) -> CheckpointInfo | None:
    """The newest checkpoint of a run, with every file checked against its hash.

    Args:
        folder: where `save_training_state` wrote.
        group: ranks that share the reading; collective on it, and all raise or return the same. None reads alone.

    Returns:
        None where there is no checkpoint.

    Raises:
        ValueError: a file of the newest checkpoint is missing, truncated or altered. The message names the file, the
            newest earlier checkpoint that is intact, and what to remove to resume from that one.
    """
    paths = _agree(list_checkpoints(folder), group)
    if not paths:
        return None
    manifest, fault = _check(paths[-1], group)
    if manifest is not None:
        return CheckpointInfo(paths[-1], manifest)
    broken = [paths[-1]]
    for path in reversed(paths[:-1]):
        manifest, _ = _check(path, group)
        if manifest is not None:
            offer = f"{path} is intact: to resume from it, remove"
            break
        broken.append(path)
    else:
        offer = "no earlier checkpoint is intact: to start from the beginning, remove"
    raise ValueError(
        f"a checkpoint must be as it was saved; {fault}. {offer} {' and '.join(str(path) for path in broken)}"
    )


def _check(path: Path, group: dist.ProcessGroup | None) -> tuple[Manifest | None, str | None]:
    """The manifest of an intact checkpoint, or None and its fault."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    manifest, fault = None, None
    try:
        manifest = Manifest.read(path)
        mine = sorted(manifest.files)[rank::size]
        fault = find_fault(path, {name: manifest.files[name] for name in mine})
    except ValueError as error:
        fault = str(error)
    faults: list[str | None] = [fault]
    if group is not None:
        faults = [None] * size
        dist.all_gather_object(faults, fault, group=group)
    fault = next((fault for fault in faults if fault is not None), None)
    return (None, fault) if fault is not None else (manifest, None)


def _agree(paths: list[Path], group: dist.ProcessGroup | None) -> list[Path]:
    """The paths as the group's first rank sees them: a listing may race with a rank that still removes."""
    if group is None:
        return paths
    box = [paths]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


# What every rank does alone but all must succeed in: a block that fails on one rank fails on all.
@contextmanager
def all_or_none(action: str) -> Iterator[None]:
    """Run a block on every rank; when it raised anywhere, raise everywhere. Collective on the whole job.

    The block must hold no collective: a rank that failed would leave the others waiting in it.

    Args:
        action: what the block does, for the message: "writing rank state".

    Raises:
        RuntimeError: the block failed on other ranks; it names them. The failing rank raises its own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - kept, told to the other ranks, and raised again below
        failure = error
    report = None if failure is None else f"{type(failure).__name__}: {failure}"
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise RuntimeError(f"{action} failed on {'; '.join(failed)}")
