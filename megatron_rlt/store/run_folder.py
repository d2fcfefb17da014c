"""The record of a run: its resolved configuration in `config.yaml`; command, times, versions, commits in `run.json`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.loading import read_yaml, to_yaml
from megatron_rlt.given_files import read_json_object
from megatron_rlt.whole_files import make_folder, write_text

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"

_DAMAGED = "the run folder is damaged: choose another output_dir"

# What a resumed run may change: how long it goes on, which machines it runs on, what is kept, shown and measured of it,
# and the folder's own place. A key covers everything below it; `*` stands for one level.
_MAY_CHANGE = (
    "num_steps",
    "num_epochs",
    "world_size",
    "*.layout",
    "*.recompute",
    "checkpoint",
    "evaluation",
    "metrics",
    "mismatch.max_rollout_gap",
    "rollout.vllm.server",
    "watchdog",
    "output_dir",
)


@dataclass(frozen=True)
class Start:
    """One start of the program on a run folder."""

    time: str  # UTC, ISO 8601
    world_size: int
    git_commit: str | None  # with "+changes" when the tree differed from the commit; None outside a repository
    versions: Mapping[str, str]


def check_run_folder(folder: Path, command: str, config: JobConfig) -> None:
    """Raise ValueError, naming keys that differ, if the folder holds another run. Only reads: every rank may call."""
    if not (folder / CONFIG_FILE).is_file():
        return
    check_command(folder, command)
    old = resume_fixed_values(_read_config(folder / CONFIG_FILE))
    changes = describe_changes(old, resume_fixed_values(config.model_dump(mode="json")))
    if changes:
        raise ValueError(
            f"a folder holds one run; output_dir {folder} holds one with another configuration: {changes}. "
            "Put the values back to resume it, or choose another output_dir"
        )


def check_contents(folder: Path, contents: Mapping[str, str]) -> None:
    """Raise ValueError if the folder's run began with other contents, hashes by name, under the same paths.

    A folder of an earlier version, which holds none, passes.
    """
    held = _read_run(folder).get("contents", {})
    known = contents.keys() & held.keys()
    if changes := describe_changes({name: held[name] for name in known}, {name: contents[name] for name in known}):
        raise ValueError(
            f"a run is resumed with the files that it began with; output_dir {folder} holds one with others: {changes}."
            " Put the files back to resume it, or choose another output_dir"
        )


def check_command(folder: Path, command: str) -> None:
    """Raise ValueError if the folder holds a run of another command."""
    held = _read_run(folder).get("command", command)
    if held != command:
        raise ValueError(
            f"a folder holds one run; output_dir {folder} holds a run of `{held}`, not of `{command}`: "
            "choose another output_dir"
        )


def resume_fixed_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration that must stay as they are when its run is resumed, by dotted key."""
    return {key: value for key, value in _flat(tree).items() if not _may_change(key)}


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every key that differs, with both values; empty where none does."""
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in differing)


def write_run_folder(
    folder: Path, command: str, config: JobConfig, *, world_size: int, contents: Mapping[str, str] | None = None
) -> None:
    """Write the record of a run, or add this start to those of a resumed one. One rank calls, after the checks.

    `contents`: as for `check_contents`, if the command checks them.
    """
    make_folder(folder)
    path, held = folder / RUN_FILE, _read_run(folder)
    starts = held.get("starts", [])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    starts.append(asdict(Start(now, world_size, git_commit(Path(__file__).parent), _versions())))
    record = {"command": command, "contents": held.get("contents", {}) | dict(contents or {}), "starts": starts}
    write_text(path, json.dumps(record, indent=2))
    write_text(folder / CONFIG_FILE, to_yaml(config))


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that tracks the files of a folder, marked when they differ from it."""
    try:
        tracked = _git(folder, "ls-files", "--", ".")
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--", ".")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    if not tracked:
        return None
    return f"{commit}+changes" if changes else commit


def _read_run(folder: Path) -> dict[str, Any]:
    """Content of `run.json`; empty without the file."""
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    record = read_json_object(path, remedy=_DAMAGED)
    kinds = {"command": str, "starts": list, "contents": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name, kind()), kind) or (name != "contents" and name not in record):
            raise ValueError(f"{path}: holds no valid {name!r}; {_DAMAGED}")
    return record


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_DAMAGED}") from error
    if not values:
        raise ValueError(f"{path}: holds no configuration; {_DAMAGED}")
    return values


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _versions() -> dict[str, str]:
    """Of every installed package: what a number depended on is known only afterwards."""
    found = (item.metadata for item in distributions())  # each access reads a file
    return dict(sorted((str(metadata["Name"]), str(metadata["Version"])) for metadata in found))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _may_change(key: str) -> bool:
    names = key.split(".")
    for pattern in _MAY_CHANGE:
        wanted = pattern.split(".")
        if len(wanted) <= len(names) and all(want in ("*", name) for want, name in zip(wanted, names, strict=False)):
            return True
    return False
