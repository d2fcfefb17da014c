"""A section of the configuration tree, and the kinds of numbers and text its fields hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_rlt.visible_text import is_blank

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{\w+\})")
_LONGEST_NAME = 255  # bytes, on every usual file system

# Bounds keep a slip such as 10**30 from becoming a loop, a tensor or a wait that never ends.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(gt=0, le=2**20)]
"""Of what is started or held one by one: ranks, questions, completions of a question."""
ByteCount = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, lt=1e30)]
NonNegativeFloat = Annotated[float, Field(ge=0, lt=1e30)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""Logits divided by less leave the range in which float32 tells them apart."""
Fraction = Annotated[float, Field(gt=0, le=1)]


def _visible(text: str) -> str:
    if is_blank(text):
        raise ValueError("must hold visible text")
    return text


NonEmptyText = Annotated[str, AfterValidator(_visible)]


def with_home(path: str) -> str:
    """A path with its `~` or `~user` replaced; raises ValueError for a name that no file can have, or nobody means.

    `./~x` and `./$x`, which name a file here, become absolute: `Path` would drop the `./`.
    """
    if is_blank(path):
        raise ValueError("must be a path; `.` is the current folder")
    if "\0" in path or any(len(part.encode(errors="surrogateescape")) > _LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"must be a path whose names have at most {_LONGEST_NAME} bytes, none of them 0")
    if variable := _VARIABLE.match(path):
        raise ValueError(
            f"must be a path: {variable[0]} is not replaced in a configuration; write out what it stands for, or let"
            f' the shell do it (KEY="{path}" behind the file); ./{path} is a file here'
        )
    if path.startswith(("./~", "./$")):
        return os.path.abspath(path)  # noqa: PTH100 - as above
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path's own raises for an unknown user
    if path.startswith("~") and expanded == path:
        raise ValueError(f"must be a path: there is no home folder for {path.split('/')[0]}; ./{path} is a file here")
    return expanded


def _home(value: object) -> object:
    return with_home(value) if isinstance(value, str) else value


FilePath = Annotated[Path, BeforeValidator(_home)]
"""A file or folder; `~` at the front is the home folder, as in a shell."""


class Section(BaseModel):
    """A frozen part of the configuration tree; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
