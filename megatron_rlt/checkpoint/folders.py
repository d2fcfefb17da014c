"""The checkpoint folders of a run, such as `step-000007`: written under a hidden temporary name, renamed when complete.

Leftovers of a killed run keep the temporary name; they are ignored, and removed at the next save. `all_or_none` makes a
block that fails on one rank fail on all.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.checkpoint.manifest import STEP_NAME, Manifest, SavedLayout, find_difference, find_fault
from megatron_rlt.disk_faults import DiskError, refusal
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.whole_files import discard, flush_to_disk

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
    return folder / STEP_NAME.format(step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def sweep_leftovers(folder: Path) -> None:
    """Remove the leftovers of interrupted saves and removals."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def keep_newest(folder: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints; an interrupted removal leaves no partial checkpoint."""
    for path in list_checkpoints(folder)[:-keep_last]:
        discard(path)
    flush_to_disk(folder)


def find_resumable(folder: Path, *, group: dist.ProcessGroup | None) -> CheckpointInfo | None:
    """The newest checkpoint of a run, with every file checked against its hash; None if there is no checkpoint.

    Args:
        group: ranks that split the reading; collective on it, with the same result on all. None: this rank alone.

    Raises:
        ValueError: a file of the newest checkpoint is missing, truncated or altered. The message names the file, the
            newest earlier checkpoint that is intact, and the folders to remove to resume from it.
    """
    paths = list_checkpoints(folder)
    if group is not None:  # listings may differ while another rank still removes checkpoints
        paths = broadcast_record(paths, source_rank=dist.get_global_rank(group, 0), group=group)
    if not paths:
        return None
    manifest, fault = check_files(paths[-1], group)
    if manifest is not None:
        return CheckpointInfo(paths[-1], manifest)
    broken = [paths[-1]]
    for path in reversed(paths[:-1]):
        manifest, _ = check_files(path, group)
        if manifest is not None:
            offer = f"{path} is intact: to resume from it, remove"
            break
        broken.append(path)
    else:
        offer = "no earlier checkpoint is intact: to start from the beginning, remove"
    raise ValueError(
        f"a checkpoint must be as it was saved; {fault}. {offer} {' and '.join(str(path) for path in broken)}"
    )


def check_newest_layout(folder: Path, layout: SavedLayout) -> None:
    """Raise ValueError if the newest checkpoint cannot be resumed in a layout; damage is left to `find_resumable`."""
    for path in list_checkpoints(folder)[-1:]:
        try:
            fault = layout_fault(path, Manifest.read(path), layout)
        except ValueError:
            return
        if fault is not None:
            raise ValueError(fault)


def layout_fault(path: Path, manifest: Manifest, layout: SavedLayout) -> str | None:
    """Describe why a checkpoint cannot be resumed in a layout; None if it can."""
    saved = manifest.layout
    if manifest.reshardable == "full" or (saved.tp, saved.pp) == (layout.tp, layout.pp):
        return None
    return (
        f"{path} was saved with checkpoint.reshardable=tp_pp in the layout {saved}, so it can only be resumed with the"
        f" same tp and pp, not in {layout}: go on in the saved layout; a checkpoint that you save there with"
        " checkpoint.reshardable=full can be resumed in any"
    )


def check_files(
    path: Path, group: dist.ProcessGroup | None, below: str = ""
) -> tuple[Manifest, None] | tuple[None, str]:
    """Check the files whose names start with `below` against their hashes, split over `group`. Collective.

    Returns:
        The manifest of an intact checkpoint, or None and the first fault.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    try:
        manifest = Manifest.read(path)
        if difference := find_difference(path, manifest, below):
            raise ValueError(difference)
        mine = sorted(name for name in manifest.files if name.startswith(below))[rank::size]
        fault = find_fault(path, {name: manifest.files[name] for name in mine})
    except ValueError as error:
        fault = str(error)
    faults = [fault] * size
    if group is not None:
        dist.all_gather_object(faults, fault, group=group)
    fault = next((fault for fault in faults if fault is not None), None)
    return (None, fault) if fault is not None else (manifest, None)


@contextmanager
def all_or_none(action: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Run a block on every rank of a group; if it raises on any, raise on all. Collective on the group.

    The block must not call a collective: a rank that failed would leave the others waiting in it.

    Args:
        action: the block's action, for the message, such as "writing rank state".

    Raises:
        RuntimeError: the block failed on the ranks that it names. A failing rank raises its own error.
        DiskError: the disk refused on any rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below, after the other ranks know
        line = refusal(error, None) if isinstance(error, OSError) else None
        failure = error if line is None else DiskError(line)
    refused = isinstance(failure, DiskError)
    report = None if failure is None else (str(failure) if refused else f"{type(failure).__name__}: {failure}", refused)
    reports: list[tuple[str, bool] | None] = [None] * group.size()
    dist.all_gather_object(reports, report, group=group)
    if failure is not None:
        raise failure
    failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
    if failed:
        message = f"{action} failed on {'; '.join(f'rank {rank}: {text}' for rank, text, _ in failed)}"
        raise (DiskError if all(refused for *_, refused in failed) else RuntimeError)(message)
