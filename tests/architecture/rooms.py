"""Which room may import which, as data, and the reader that finds what a module does against it.

What each room is for stands in `docs/architecture.md`, the table of rooms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

PACKAGE = "megatron_rlt"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

_CONFIG = {
    *("config", "config/commands", "types", "disk_faults", "whole_files", "folder_lock", "given_files", "visible_text")
}
_BENEATH_STAGES = {"models", "parallel"} | _CONFIG
_STAGES = {"data", "prompts", "rollout", "scoring", "policy", "checkpoint", "convert", "metrics", "store"}
_PURE_STAGES = {"rewards", "algorithm"}
_BENEATH_JOBS = {
    *(_STAGES | _PURE_STAGES | _BENEATH_STAGES | {"launch"}),
    *("rollout/megatron", "rollout/vllm", "rollout/vllm/transfer", "rollout/weight_sync"),
}
_COMMANDS = ("train", "rlvr", "collect", "score", "evaluate", "parity", "convert")
_FLOORS = {"jobs/run", "jobs/reward", "jobs/rl"}

# Room -> the other rooms it may import. A room is a folder or file of the package; a sub-room (`jobs/train`) stands in
# the table beside the room it lies in, and a file belongs to the innermost room that holds it.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "given_files": {"visible_text"},
    "visible_text": set(),
    "disk_faults": set(),
    "whole_files": {"disk_faults"},
    "folder_lock": {"disk_faults", "whole_files"},
    "config": {"types", "given_files", "visible_text"},
    "config/commands": {"config", "types", "given_files"},
    "planning": {"config", "config/commands", "given_files"},
    "parallel": _CONFIG,
    "launch": {"parallel"} | _CONFIG,
    "models": {"parallel"} | _CONFIG,
    **dict.fromkeys(_STAGES, _BENEATH_STAGES),
    **dict.fromkeys(_PURE_STAGES, _CONFIG),
    "store": {"metrics"} | _BENEATH_STAGES,
    "rollout/megatron": {"rollout"} | _BENEATH_STAGES,
    "rollout/weight_sync": {"rollout"} | _BENEATH_STAGES,
    "rollout/vllm": {"rollout", "rollout/weight_sync"} | _BENEATH_STAGES,
    "rollout/vllm/transfer": {"rollout", "rollout/vllm"} | _BENEATH_STAGES,
    "jobs/run": _BENEATH_JOBS,
    "jobs/reward": _BENEATH_JOBS | {"jobs/run"},
    "jobs/rl": _BENEATH_JOBS | {"jobs/run", "jobs/reward"},
    **{f"jobs/{command}": _BENEATH_JOBS | _FLOORS for command in _COMMANDS},
    "jobs/score": _BENEATH_JOBS | _FLOORS | {"jobs/collect"},
    "jobs/parity": _BENEATH_JOBS | _FLOORS | {"jobs/train"},
    "jobs": _BENEATH_JOBS | _FLOORS | {"planning"},
    "cluster": {"launch", "parallel"} | _CONFIG,
    "cli": {"launch", "cluster", "config", "config/commands", "disk_faults", "given_files", "visible_text"},
    "__main__": {"cli"},
}

# Library -> the only files and folders that may import it.
IMPORTERS: dict[str, tuple[str, ...]] = {
    "megatron.core": ("parallel/", "models/", "policy/", "checkpoint/"),
    "megatron.energon": ("data/loader.py", "data/position.py", "data/energon_index.py"),
    "transformers": ("prompts/tokenizer.py", "models/rope.py", "models/dense.py"),
    "transformer_engine": ("models/", "scoring/"),
    "vllm": ("rollout/vllm/cpu_memory.py", "rollout/vllm/model.py", "rollout/vllm/transfer/direct.py"),
    "safetensors": ("models/weights/",),
    "pyarrow": ("data/", "store/"),
    "datasets": ("data/rows.py",),
    "pydantic": ("config/", "data/shards.py", "checkpoint/"),
    "tensorboard": ("metrics/writer.py",),
    "torch.utils.tensorboard": ("metrics/writer.py",),
    "wandb": ("metrics/writer.py",),
    "psutil": ("metrics/memory.py", "rollout/vllm/server_guard.py", "parallel/network.py"),
    "httpx2": ("rollout/vllm/client.py",),
    "typer": ("cli.py",),
}

# Runs before torch is imported: bad input is refused within a second.
WITHOUT_TORCH = (
    "config/",
    "given_files.py",
    "visible_text.py",
    "disk_faults.py",
    "planning/",
    "jobs/plan.py",
    "cli.py",
    "__main__.py",
    "parallel/environment.py",
    "parallel/network.py",
    "launch/watchdog.py",
    "launch/records.py",
    "launch/progress.py",
    "cluster/status.py",
    "cluster/failed_ranks.py",
    "cluster/pipeline.py",
)
# Plain tensors and text: no groups, no Megatron.
WITHOUT_GROUPS = ("rewards/", "algorithm/", "prompts/", "types.py")

READS_ENVIRONMENT = ("parallel/environment.py",)
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base", "manager"}


def broken_rules(path: str, source: str) -> list[str]:
    """What one file of the package does against the table.

    Args:
        path: relative to the package, such as `rewards/rlt.py`.
    """
    tree = ast.parse(source)
    faults = []
    for line, module in _imports(tree):
        faults += [f"{path}:{line}: {fault}" for fault in _import_faults(path, module)]
    if not _is_in(path, READS_ENVIRONMENT):
        faults += [f"{path}:{line}: reads the environment; only {READS_ENVIRONMENT[0]} does" for line in _reads(tree)]
    names = {PurePosixPath(part).stem for part in PurePosixPath(path).parts}
    faults += [f"{path}: the name {name!r} says nothing" for name in sorted(names & FORBIDDEN_NAMES)]
    if source.strip() and ast.get_docstring(tree) is None:
        faults.append(f"{path}: has no docstring that says what it is for")
    return faults + size_faults(path, source)


def size_faults(path: str, source: str) -> list[str]:
    """Files and functions over their ceiling."""
    num_lines = source.count("\n")
    faults = [f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "every parsed function ends somewhere"
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return faults


def room_of(path: str) -> str:
    """The innermost room that holds a file: `jobs/train/step.py` -> `jobs/train`; `cli.py` -> `cli`."""
    place = PurePosixPath(path.removesuffix(".py"))
    return next((str(room) for room in (place, *place.parents) if str(room) in MAY_IMPORT), place.parts[0])


def _import_faults(path: str, module: str) -> Iterator[str]:
    room = room_of(path)
    if module.startswith(f"{PACKAGE}."):
        other = room_of("/".join(module.split(".")[1:]))
        if other != room and other not in MAY_IMPORT[room]:
            yield f"{room} must not import {other}"
    for library, importers in IMPORTERS.items():
        if _is_under(module, library) and not _is_in(path, importers):
            yield f"imports {library}; only {', '.join(importers)} may"
    if _is_in(path, WITHOUT_TORCH) and (_is_under(module, "torch") or _is_under(module, "megatron")):
        yield f"imports {module}, but must work before torch is imported"
    if _is_in(path, WITHOUT_GROUPS) and (_is_under(module, "torch.distributed") or _is_under(module, "megatron")):
        yield f"imports {module}, but deals with plain tensors and text"


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import, also inside functions; `from a import b` counts as `a.b`, which is under `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _reads(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ("environ", "getenv", "putenv"))


def _is_under(module: str, library: str) -> bool:
    return module == library or module.startswith(f"{library}.")


def _is_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)
