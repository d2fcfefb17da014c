"""YAML file and dotted overrides in, a checked configuration out; every fault of both is one clear line.

A relative path in a configuration is relative to the current working directory, not to the YAML file. Types are
strict: `tp: "2"` and `tp: yes` are errors, never 2 and 1. Rules across sections are left to the commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_rlt.config.hf_config import shown
from megatron_rlt.config.keys import Key, closest_key, holds_text, keys_of, renamed
from megatron_rlt.config.section import Section
from megatron_rlt.given_files import FaultsError, read_text, reason_of

Config = TypeVar("Config", bound=Section)
Tree = dict[str, Any]

# YAML 1.1 reads 1e-6 as text because it has no dot; people write it as a number.
_NULLS = ("", "~", "null", "Null", "NULL")
_PLAIN_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_MOST_LEVELS, _MOST_VALUES = 50, 100_000  # of a configuration, aliases written out
_CREDENTIALS = re.compile(r"://[^/\s]*@")


def load_config(config_class: type[Config], path: Path, overrides: Sequence[str]) -> Config:
    """Read a command's configuration; values of `dotted.key=value` overrides are YAML, and later ones win.

    Raises ValueError with one line per fault: dotted key, offending value, rule.
    """
    return _checked(config_class, read_yaml(path), overrides, source=str(path))


def load_overrides(config_class: type[Config], given: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """As `load_config` for `given` keys and overrides without a file; `model_fields_set` has the named keys."""
    return _checked(config_class, dict(given), overrides, source="command line")


def with_changes(below: Config, above: Config) -> Config:
    """`below` with every value that was named when `above` was loaded; sections are merged key by key."""
    tree = _overlay(below.model_dump(mode="json"), above.model_dump(mode="json", exclude_unset=True))
    return type(below).model_validate_json(json.dumps(tree), strict=True)


def has_section(path: Path, overrides: Sequence[str], name: str) -> bool:
    """Whether a configuration or its overrides name a top-level section; raises ValueError as `load_config`."""
    return name in read_tree(path, overrides)


def read_tree(path: Path, overrides: Sequence[str]) -> Tree:
    """What a configuration names, unchecked, and the names at the top of its overrides: an empty section, or None.

    Raises ValueError as `load_config`.
    """
    tree = read_yaml(path)
    for override in overrides:
        name, dot, _ = override.partition("=")[0].partition(".")
        tree.setdefault(name.strip(), {} if dot else None)
    return tree


def to_yaml(config: Section) -> str:
    """The resolved configuration, every key stated; `load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-6 as a number and dates as text; merge keys (`<<: *name`) work.

    It refuses a key given twice, what costs more than a configuration can be worth, and numbers that YAML 1.1 reads in
    another base than people do.
    """

    def __init__(self, stream: Any) -> None:  # noqa: ANN401 - as PyYAML's
        super().__init__(stream)
        self._level, self._num_values = 0, 0
        self._sizes: dict[int, int] = {}  # values of a node, by its id; the tree keeps all nodes

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - as PyYAML's
        """Count levels and values before anything is made of them."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, is_alias = self._num_values, self.check_event(yaml.AliasEvent)
        self._level, self._num_values = self._level + 1, before + 1
        if self._level > _MOST_LEVELS:
            raise _refusal(f"nested deeper than {_MOST_LEVELS} levels", event.start_mark)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise _refusal("an anchor holds itself; write the values out", event.start_mark)
        self._num_values += self._sizes[id(node)] if is_alias else 0
        if self._num_values > _MOST_VALUES:
            raise _refusal(f"more than {_MOST_VALUES} values, aliases written out", event.start_mark)
        self._sizes.setdefault(id(node), self._num_values - before)
        self._level -= 1
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number whose base is 10 to everybody."""
        digits = str(node.value).lstrip("+-").replace("_", "")
        if ":" in digits or (digits.isdigit() and len(digits) > 1 and digits.startswith("0")):
            base = 60 if ":" in digits else 8
            raise _refusal(
                f"{node.value} is a number of base {base} in YAML; write it in base 10, or quote a text",
                node.start_mark,
            )
        is_float = node.tag == "tag:yaml.org,2002:float"
        number: int | float = self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)
        return number

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - PyYAML's types name another
        """Check the keys as they were written: merging adds others later."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise _refusal(f"key {shown(key)} must be text", key_node.start_mark)
            if key in seen:
                raise _refusal(f"key {shown(key)} stands twice", key_node.start_mark)
            seen.add(key)
        return node


def _refusal(problem: str, mark: Any) -> yaml.constructor.ConstructorError:  # noqa: ANN401 - PyYAML's Mark
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text that looks like 1e-6 in quotes."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:float", _PLAIN_EXPONENT, list("-+0123456789"))
for _kind in ("value", "timestamp"):  # `=`, and a date, are text
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_yaml_str)  # type: ignore[type-var]
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _checked(config_class: type[Config], tree: Tree, overrides: Sequence[str], *, source: str) -> Config:
    from_command_line = [_apply_override(tree, override, config_class) for override in overrides]
    tree = _over_presets(config_class, tree)
    try:
        return config_class.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = [_fault_line(fault, config_class, source, from_command_line) for fault in error.errors()]
        raise FaultsError(lines) from error


def read_yaml(path: Path) -> Tree:
    """The keys of a YAML file, unchecked; raises ValueError as `load_config`."""
    text = read_text(path, missing="give the path of a YAML file", remedy="save the file as UTF-8")
    tree = _parse(text, source=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must hold keys and values at the top, got {_shown(tree)}")
    return tree


def _parse(text: str, *, source: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}: line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ValueError(f"{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a tag such as !!int before other text, or thousands of digits
        raise ValueError(f"{source}: not valid YAML: {reason_of(error)}") from error


def _apply_override(tree: Tree, override: str, config_class: type[Section]) -> str:
    """Set one `dotted.key=value` in the tree; returns the key."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    names = dotted.split(".")
    if not equals or not all(names) or len(names) > _MOST_LEVELS:
        raise ValueError(f"command line: {shown(override)} is no override; write dotted.key=value, such as num_steps=8")
    node = tree
    for name in names[:-1]:
        child = node.get(name)
        # A value where the override wants a section: the schema decides which of them is wrong. A copy, since several
        # keys of a file can share one section by an anchor.
        child = node[name] = dict(child) if isinstance(child, dict) else {}
        node = child
    node[names[-1]] = _override_value(text, source=f"command line: {dotted}", is_text=holds_text(config_class, names))
    return dotted


def _override_value(text: str, *, source: str, is_text: bool) -> Any:  # noqa: ANN401 - whatever the YAML holds
    """The value that an override writes, as YAML without comments, since a shell's word has none.

    `is_text`: the key holds text or a path. Then the word is that text, whatever YAML would read in it
    (`output_dir=2024`, `run #3`, `Answer: yes`), unless it is null or quoted as a whole.
    """
    word = text.strip()
    if is_text and word not in _NULLS:
        quoted = _quoted(word) if word[0] in "'\"" else None
        return word if quoted is None else quoted
    value = _parse(text, source=source)
    node = yaml.compose(text, _Loader)
    if text[0 if node is None else node.end_mark.index :].strip():
        raise ValueError(f"{source}: {_shown(text)} holds a comment of YAML's; leave out what begins with #")
    return value


def _quoted(word: str) -> str | None:
    """The text of a word that is quoted as a whole; None for any other."""
    try:
        node = yaml.compose(word, _Loader)
    except yaml.YAMLError:
        return None
    if not isinstance(node, yaml.ScalarNode) or node.end_mark.index != len(word):
        return None
    return str(node.value)


def _over_presets(config_class: type[Section], tree: Tree) -> Tree:
    """Lay the tree over the sections a command presets, so that naming one key keeps the section's other presets.

    Without this, `optimizer: {lr: 2e-5}` would turn `sft`'s cosine schedule back into the section's constant one.
    """
    merged = dict(tree)
    for name, field in config_class.model_fields.items():
        if isinstance(field.default, Section) and isinstance(tree.get(name), dict):
            preset = field.default.model_dump(mode="json", exclude_unset=True)
            merged[name] = _overlay(preset, tree[name])
    return merged


def _overlay(below: Tree, above: Tree) -> Tree:
    result = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            result[name] = _overlay(below[name], above[name])
    return result


def _fault_line(fault: Mapping[str, Any], config_class: type[Section], source: str, overridden: Sequence[str]) -> str:
    dotted = ".".join(str(part) for part in fault["loc"])
    at_command_line = any(
        dotted == key or dotted.startswith(f"{key}.") or (key.startswith(f"{dotted}.") and fault["type"] != "missing")
        for key in overridden
    )
    where = "command line" if at_command_line else source
    return f"{where}: {dotted}: {_complaint(fault, dotted, keys_of(config_class))}"


def _complaint(fault: Mapping[str, Any], dotted: str, keys: Sequence[Key]) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "value_error":
        return f"{fault['ctx']['error']}, got {_shown(value)}"
    now = renamed(dotted, value) if kind in ("extra_forbidden", "literal_error") else None
    if now is not None:
        return f"is now {now}"
    known = {key.dotted: key for key in keys}
    if kind == "missing":
        return f"required key is missing ({known[dotted].sentence.rstrip('.')})"
    if kind == "extra_forbidden":
        meant = closest_key(dotted, keys)
        return "unknown key" + (f"; closest valid key: {meant}" if meant else "; --help-config lists the valid keys")
    if kind == "model_type":
        inner = [key.dotted.rpartition(".")[2] for key in keys if key.dotted.rpartition(".")[0] == dotted]
        return f"must be a section with keys {', '.join(inner)}, got {_shown(value)}"
    rule = fault["msg"].replace("Input should be ", "must be ").replace("a valid array", "a list")
    return f"{rule}, got {_shown(value)}"


def _shown(value: object) -> str:
    """A value as its YAML reader would write it, cut to one short line, without a password in an address."""
    text = _CREDENTIALS.sub("://***@", json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."
