"""Refuses model folders that bring code: it would run with the user's rights, and nothing here needs it."""

from __future__ import annotations

import json
from pathlib import Path

_FILES = "*config.json"  # config.json, tokenizer_config.json, generation_config.json and others of their kind
_KEY = "auto_map"  # which Python file of the folder, or of another repository, defines a class


def remote_code_faults(folder: Path) -> list[str]:
    """One line per file of a model folder that names code; one that is not readable is left to its own check."""
    faults = []
    for file in sorted(folder.glob(_FILES)):
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        sections = [content, *content.values()] if isinstance(content, dict) else []
        if any(isinstance(section, dict) and _KEY in section for section in sections):
            faults.append(
                f"{file} names code of its own ({_KEY}), and no code of a model folder is ever run; take"
                f" a model of transformers' own classes, or remove {_KEY} if it is one"
            )
    return faults
