"""The table of rooms, as data, and the reader that finds what a module does against it.

The picture it holds: `cli` -> `jobs` -> stage rooms -> `models` -> `parallel` -> `config`, `types`. Stage rooms never
import each other; `rewards` and `algorithm` are pure; each heavy library has few named importers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

PACKAGE = "megatron_rlt"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

_BENEATH_STAGES = {"models", "parallel", "config", "types"}
_STAGES = {"data", "prompts", "rollout", "scoring", "policy", "checkpoint", "metrics", "weight_sync"}
_PURE_STAGES = {"rewards", "algorithm"}

# Room -> the other rooms it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "config": set(),
    "parallel": {"config", "types"},
    "models": {"parallel", "config", "types"},
    **dict.fromkeys(_STAGES, _BENEATH_STAGES),
    **{stage: {"config", "types"} for stage in _PURE_STAGES},
    "jobs": _STAGES | _PURE_STAGES | _BENEATH_STAGES,
    "cli": {"jobs", "parallel", "config"},
    "__main__": {"cli"},
}

# Library -> the only files and folders that may import it.
IMPORTERS: dict[str, tuple[str, ...]] = {
    "megatron.core": ("parallel/", "models/", "policy/", "checkpoint/"),
    "megatron.energon": ("data/loader.py", "data/energon_index.py"),
    "transformers": ("prompts/tokenizer.py", "models/rope.py", "models/dense.py"),
    "transformer_engine": ("models/", "scoring/"),
    "vllm": ("rollout/vllm_model.py", "rollout/direct_transport.py", "rollout/gloo_transfer.py"),
    "safetensors": ("models/weights/",),
    "pyarrow": ("data/", "metrics/"),
    "datasets": ("data/rows.py",),
    "pydantic": ("config/", "data/shards.py"),
    "tensorboard": ("metrics/writer.py",),
    "torch.utils.tensorboard": ("metrics/writer.py",),
    "wandb": ("metrics/writer.py",),
    "psutil": ("metrics/memory.py", "rollout/server_guard.py"),
    "httpx2": ("rollout/vllm_server.py",),
    "typer": ("cli.py",),
}

# Runs before torch is imported: bad input is refused within a second.
WITHOUT_TORCH = (
    "config/",
    "cli.py",
    "__main__.py",
    "jobs/preflight.py",
    "models/architecture.py",
    "parallel/environment.py",
    "parallel/watchdog.py",
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
    """`rewards/rlt.py` -> `rewards`; `cli.py` -> `cli`."""
    return PurePosixPath(PurePosixPath(path).parts[0]).stem


def _import_faults(path: str, module: str) -> Iterator[str]:
    room = room_of(path)
    if module.startswith(f"{PACKAGE}."):
        other = module.split(".")[1]
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
