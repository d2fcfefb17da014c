"""The keys of a configuration tree: dotted name, default and sentence of each, read from the sections themselves."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from megatron_rlt.config.section import Section

# Keys of earlier versions, or `key=value`: what is written now. A key stands for all that end in it.
RENAMED = {
    "residency": "offload: true (was host) or false (was resident)",
    "grpo.beta": "grpo.reference.beta; grpo.reference: null stands for beta 0",
    "grpo.reference_sync_steps": "grpo.reference.sync_steps",
    "grpo.reference_mix": "grpo.reference.mix",
    "grpo.reference_residency": "grpo.reference.offload: true (was host) or false (was resident)",
    "placebo": "control",
    "checkpoint.export_hf": "checkpoint.export, a list of kinds such as [hf, nemo]; [] exports nothing",
    "selection.rule=fits": "rule: best_of_n beside max_student_tokens; without a student rule: first",
    "verifier.overlong_buffer_tokens": "verifier.overlong.buffer_tokens",
    "verifier.overlong_weight": "verifier.overlong.weight",
}


@dataclass(frozen=True)
class Key:
    """One key of a configuration; a section is a key too."""

    dotted: str
    sentence: str
    required: bool
    default: Any  # None also where required; a section's presets where the key is one
    section: type[Section] | None  # the class of the section this key opens; None for a value
    choices: tuple[str, ...]  # the words that a value may be; empty where it may be others


def keys_of(config_class: type[Section], prefix: str = "", defaults: Section | None = None) -> list[Key]:
    """All keys of a configuration, depth first in the order of the file that declares them.

    `defaults` is the instance whose values stand for missing ones: a command may preset a section differently
    from the section's own defaults (`sft` presets the optimizer).
    """
    keys: list[Key] = []
    for name, field in config_class.model_fields.items():
        section = section_class(field.annotation)
        preset = field.default if defaults is None else dict(defaults)[name]
        known = preset is not PydanticUndefined
        keys.append(
            Key(
                dotted=prefix + name,
                sentence=" ".join((field.description or "").split()),
                required=not known,
                default=preset if known else None,
                section=section,
                choices=_choices(field.annotation),
            )
        )
        if section is not None:
            keys += keys_of(section, f"{prefix}{name}.", preset if known else None)
    return keys


def section_class(annotation: object) -> type[Section] | None:
    """The section that an annotation declares, also inside `X | None`; None for a value, and for sections by name."""
    if get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def holds_text(config_class: type[Section], names: Sequence[str]) -> bool:
    """Whether the key of these names holds free text or a path, or null; False for an unknown key."""
    section: type[Section] | None = config_class
    for place, name in enumerate(names):
        if section is None or name not in section.model_fields:
            return False
        annotation = section.model_fields[name].annotation
        if place + 1 == len(names):
            return _plain_kinds(annotation) - {NoneType} in ({str}, {Path})
        if get_origin(annotation) is dict:  # sections by names of the user's
            return holds_text(get_args(annotation)[1], names[place + 2 :])
        section = section_class(annotation)
    return False


def _choices(annotation: object) -> tuple[str, ...]:
    """All words that a value, or a member of a list, may be; none where an annotation allows others."""
    kinds = _plain_kinds(annotation) - {NoneType}
    members = [one for kind in kinds for one in (get_args(kind) if get_origin(kind) in (list, tuple) else (kind,))]
    words = [one for one in members if one is not Ellipsis]
    if not all(get_origin(one) is Literal for one in words):
        return ()
    return tuple(str(word) for one in words for word in get_args(one))


def _plain_kinds(annotation: object) -> set[object]:
    """The types of `X | Y`, annotations of each left aside."""
    if get_origin(annotation) is Annotated:
        return _plain_kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _plain_kinds(part)}
    return {annotation}


def renamed(dotted: str, value: object) -> str | None:
    """What stands now for a key, or a value of it, of an earlier version; None where it never was one."""
    names = (dotted, f"{dotted}={value}")
    return next((new for old, new in RENAMED.items() if any(f".{name}".endswith(f".{old}") for name in names)), None)


def closest_key(dotted: str, keys: Sequence[Key]) -> str | None:
    """The likeliest valid key: one of the same last name, else a sibling, else any key, of similar spelling."""
    parent, _, leaf = dotted.rpartition(".")
    names = [key.dotted for key in keys]
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    candidates = [
        *(name for name in names if name.rpartition(".")[2] == leaf),
        *(siblings[near] for near in difflib.get_close_matches(leaf, siblings, n=1)),
        *difflib.get_close_matches(dotted, names, n=1),
    ]
    return candidates[0] if candidates else None
