"""Write the reference of all configuration keys from the classes that declare them.

    python -m tools.docs.configuration            writes docs/reference/configuration.md

Types, bounds, defaults and sentences come from the JSON schema that pydantic makes of `megatron_rlt/config`. The keys
of a command stand in its table, a section that several commands share in one of its own. A test keeps the page in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.section import Section
from tools.docs.page import PAGES, cell, write_page

PAGE = PAGES / "reference" / "configuration.md"
Schema = dict[str, Any]

_INTRODUCTION = """\
# Configuration

A command reads one YAML file that lists only what differs from the defaults below. `dotted.key=value` after the
file's name wins over the file. An unknown key stops the run and names the closest valid one. Relative paths are
relative to the current directory, not to the file. Where a sentence says None, YAML writes `null`.
Three commands read no file: `reweigh` begins with the settings of its source, and the keys of `convert` and `inspect`
are options such as `--dtype`. `plan` reads the file of another command; its own keys are given as `key=value`.
`COMMAND --help-config` prints the keys of all others, of `reweigh` and of `plan` in a terminal.

<!-- Written by `python -m tools.docs.configuration`; change the docstrings in megatron_rlt/config, not this page. -->
"""
_LOWER = (("exclusiveMinimum", "<"), ("minimum", "≤"))
_UPPER = (("exclusiveMaximum", "<"), ("maximum", "≤"))
_HEADER = "| key | type | default | meaning |\n|---|---|---|---|\n"


def commands() -> dict[str, type[Section]]:
    """The configuration of every command, in the order in which a user meets them."""
    return {name: command.config_class for name, command in COMMANDS.items()}


def configuration_page() -> str:
    """The page's Markdown."""
    schemas = {name: config.model_json_schema() for name, config in commands().items()}
    sections: dict[str, Schema] = {}
    for schema in schemas.values():
        sections |= schema.get("$defs", {})
    parts = [_INTRODUCTION]
    for name, schema in schemas.items():
        parts.append(f"## {name}\n\n{_sentence(schema)}\n\n{_table(schema, sections)}")
    parts.append("## Sections\n\nGroups of keys that the tables above name as their type.\n")
    uses = _uses(schemas, sections)
    for name in sorted(sections, key=_heading):
        used = ", ".join(f"`{key}`" for key in uses[name])
        parts.append(
            f"### {_heading(name)}\n\n{_sentence(sections[name])} Stands under {used}.\n\n"
            f"{_table(sections[name], sections)}"
        )
    return "\n".join(parts)


def _table(schema: Schema, sections: dict[str, Schema]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in required else _default(field, sections)
        rows.append(f"| `{name}` | {_type(field)} | {default} | {cell(field['description'])} |\n")
    return _HEADER + "".join(rows)


def _type(field: Schema) -> str:
    """What may stand there, in words."""
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        name = _heading(_target(field))
        return f"[{name}](#{name.lower().replace(' ', '-')})"
    choices = field.get("enum", [field["const"]] if "const" in field else [])
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = field["type"]
    if kind in ("integer", "number"):
        return _bounded("whole number" if kind == "integer" else "number", field)
    if kind == "object":
        return f"{_type(field['additionalProperties'])} by name"
    if kind == "array":
        return f"list of {_type(field['items'])}"
    plain = {"boolean": "`true` or `false`", "null": "`null`", "string": "text"}
    return "path" if field.get("format") == "path" else plain[kind]


_MOST_SHOWN = 10**6  # bounds above it only catch slips


def _bounded(noun: str, field: Schema) -> str:
    """`number > 0`, or `0 < number ≤ 1` where both ends are closed off."""
    lower = next(((field[name], sign) for name, sign in _LOWER if name in field), None)
    upper = next(((field[name], sign) for name, sign in _UPPER if name in field), None)
    if upper is None or upper[0] > _MOST_SHOWN:
        return noun if lower is None else f"{noun} {'≥' if lower[1] == '≤' else '>'} {lower[0]:g}"
    left = "" if lower is None else f"{lower[0]:g} {lower[1]} "
    return cell(f"{left}{noun} {upper[1]} {upper[0]:,}")


def _default(field: Schema, sections: dict[str, Schema]) -> str:
    """The default as YAML would write it; of a section only what the command sets otherwise than the section does."""
    value = field["default"]
    if "$ref" not in field:
        return f"`{_value(value)}`"
    own = {name: inner.get("default") for name, inner in sections[_target(field)]["properties"].items()}
    return ", ".join(f"`{name}: {_value(value[name])}`" for name in own if value[name] != own[name])


def _value(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"\S.*", value):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _uses(schemas: dict[str, Schema], sections: dict[str, Schema]) -> dict[str, list[str]]:
    """By section, the dotted keys it stands under, each once."""
    uses: dict[str, list[str]] = {name: [] for name in sections}
    for schema in schemas.values():
        for dotted, name in _openings(schema, sections, ""):
            if dotted not in uses[name]:
                uses[name].append(dotted)
    return uses


def _openings(schema: Schema, sections: dict[str, Schema], prefix: str) -> Iterator[tuple[str, str]]:
    for key, field in schema["properties"].items():
        by_name = field.get("additionalProperties")
        for option in (field, *field.get("anyOf", ()), *([] if by_name is None else [by_name])):
            if "$ref" in option:
                name, dotted = _target(option), prefix + key + (".NAME" if option is by_name else "")
                yield dotted, name
                yield from _openings(sections[name], sections, f"{dotted}.")


def _target(field: Schema) -> str:
    return str(field["$ref"]).rpartition("/")[2]


def _heading(class_name: str) -> str:
    """`AnswerSamplingConfig` -> `Answer sampling`."""
    words = re.findall(r"[A-Z][a-z]+[0-9]*", class_name.removesuffix("Config"))
    return " ".join(words).capitalize()


def _sentence(schema: Schema) -> str:
    text = cell(schema["description"])
    return text if text.endswith((".", "?")) else f"{text}."


if __name__ == "__main__":
    write_page(PAGE, configuration_page())
