"""Whether what a page names is there: files, functions in them, configuration keys."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache

from megatron_rlt.config.keys import keys_of
from tests.docs.pages import ROOT
from tools.docs.configuration import commands

_FILE = re.compile(r"([\w./-]+\.py)(?::([\w.]+))?")
_PATH = re.compile(r"(?:tests|tools|configs|docs|megatron_rlt)/[\w./-]*")
_KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:: .*)?")
_NAMED_STUDENT = re.compile(r"students\.extra\.\w+")  # any name will do; beneath it stand the keys of a model
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".yaml", ".py", ".txt", ".md")


def fault_of(word: str) -> str | None:
    """Why a word in backticks names nothing; None where it does, or where it is no such name."""
    if (named := _FILE.fullmatch(word)) is not None:
        return _fault_of_file(named[1], named[2])
    if _PATH.fullmatch(word):
        return None if (ROOT / word).exists() else "no such file or folder"
    if (named := _KEY.fullmatch(word)) is not None and not word.endswith(_FILE_ENDINGS):
        return _fault_of_key(named[1])
    return None


def unknown_keys(tree: Mapping[str, object]) -> list[str]:
    """Keys of a piece of YAML that no command has, dotted."""
    return [key for key in _dotted(tree) if _NAMED_STUDENT.sub("student", key) not in _all_keys()]


def _fault_of_file(path: str, symbol: str | None) -> str | None:
    """Paths are relative to the package, or to the repository."""
    file = next((place / path for place in (ROOT / "megatron_rlt", ROOT) if (place / path).is_file()), None)
    if file is None:
        return "no such file"
    if symbol is not None and symbol not in _symbols(ast.parse(file.read_text(encoding="utf-8"))):
        return f"{file.relative_to(ROOT)} has no {symbol}"
    return None


def _fault_of_key(dotted: str) -> str | None:
    keys = _all_keys()
    if dotted.split(".")[0] not in {part for key in keys for part in key.split(".")}:
        return None  # no configuration key at all
    known = dotted in keys or any(key.endswith(f".{dotted}") for key in keys)
    return None if known else "no such configuration key"


@cache
def _all_keys() -> frozenset[str]:
    return frozenset(key.dotted for config in commands().values() for key in keys_of(config))


def _symbols(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _symbols(node, f"{prefix}{node.name}.")


def _dotted(tree: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
