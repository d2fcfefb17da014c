"""Model folders that are damaged: every file of a tiny real one, and its tokenizer as the program opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from megatron_rlt.cli import main
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.models.weights.hf_reader import read_headers
from megatron_rlt.prompts.pairs import student_format, teacher_format
from tests.fuzz.mutations import DEEP, FORGING, mutated_bytes, mutated_json
from tests.fuzz.outcome import Attempt

_ROPE: tuple[Any, ...] = (
    [1], "x", 5, {"rope_type": 5}, {"rope_type": ["yarn"]}, {"rope_type": {"a": 1}}, {"rope_type": FORGING},
    {"full_attention": {"rope_theta": 1.0}}, {"rope_type": "yarn"}, {"type": None}, {"rope_theta": "x"},
)  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}

# Legal JSON that no model can mean. Each must be refused.
NEVER_RIGHT: tuple[tuple[str, Mapping[str, Any]], ...] = (
    *(("config.json", {key: value}) for key in ("rms_norm_eps", "max_position_embeddings", "num_hidden_layers")
      for value in (float("nan"), float("inf"), 0, -1, None, "x", True, [1], 10**400)),
    *(("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": value}})
      for value in (float("nan"), float("inf"), 0, -1e4, 1e300, "x", True)),
    *(("config.json", {"rope_parameters": {**_LLAMA3, key: value}})
      for key in ("factor", "low_freq_factor", "high_freq_factor") for value in (0, -8.0, float("nan"), "8", None)),
    *(("config.json", {"rope_parameters": {"rope_type": kind, "factor": value, "rope_theta": 1e4}})
      for kind in ("linear", "yarn") for value in (0, -1, float("inf"), [2])),
    *(("config.json", {"rope_parameters": value}) for value in _ROPE[:8]),
    *(("config.json", {"layer_types": value}) for value in (5, "full_attention", {"a": 1}, [5])),
    *(("config.json", {"use_sliding_window": True, "sliding_window": 9, "layer_types": None,
                      "max_window_layers": value})
      for value in ("x", [1], 1.5, True)),
    *((name, {"eos_token_id": value}) for name in ("generation_config.json", "config.json")
      for value in (100_000, [2, 100_000], -1, "x", {"a": 1}, True, 10**30)),
    *(("config.json", {"max_window_layers": value}) for value in ("x", [1], {})),
    ("config.json", {"num_hidden_layers": 2**40}),
)  # fmt: skip

_TEMPLATES = (
    "{{ 1 / 0 }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% if %}", "{{ messages[9].content }}",
    "{% for a in range(10**9) %}x{% endfor %}", "{{ raise_exception('" + "a\\nb" + "') }}", "{{ messages | nope }}",
    "\0",
    "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "", " ",
    FORGING, "{{ messages[0].content.no.such }}", "{% set x = namespace(a=1) %}{{ x.b.c }}",
)  # fmt: skip


def model_folders(model: Path) -> Iterator[Attempt]:
    """Damaged folders as a command with `--dry-run` meets them, without end."""
    random, number = Random(1), 0
    place = model.parent / "fuzzed"
    whole = (model / "config.json").read_bytes()
    yield Attempt("untouched", partial(_dry_run, model, place, "config.json", whole), must_accept=True)
    for name, changes in NEVER_RIGHT:
        yield Attempt(
            f"{name}: {dict(changes)!r:.200}",
            partial(_dry_run, model, place, name, _changed(model, name, changes)),
            True,
        )
    names = sorted(file.name for file in model.iterdir())
    for name in names:
        for content in (b"", b"[]", b"null", b"\xff\xfe{", b'{"a": ', DEEP.encode(), b"1" * 5000):
            yield Attempt(f"{name}: {content[:20]!r}", partial(_dry_run, model, place, name, content))
    while True:
        number += 1
        name = random.choice(names)
        yield Attempt(
            f"{name}: mutation {number}", partial(_dry_run, model, place, name, _mutated(model / name, random))
        )


def tokenizers(model: Path) -> Iterator[Attempt]:
    """Damaged tokenizers and templates as teacher and student open them, without end."""
    random, number = Random(2), 0
    place = model.parent / "fuzzed"
    whole = (model / "config.json").read_bytes()
    yield Attempt("untouched", partial(_open, model, place, "config.json", whole), must_accept=True)
    for template in _TEMPLATES:
        yield Attempt(
            f"template {template[:60]!r}", partial(_open, model, place, "chat_template.jinja", template.encode())
        )
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
    )
    while True:
        number += 1
        name = random.choice(names)
        yield Attempt(f"{name}: mutation {number}", partial(_open, model, place, name, _mutated(model / name, random)))


def _mutated(file: Path, random: Random) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".json" and random.randrange(3):
        return mutated_json(content, random)
    return mutated_bytes(content[:4000] if file.suffix == ".safetensors" and random.randrange(2) else content, random)


def _changed(model: Path, name: str, changes: Mapping[str, Any]) -> bytes:
    return json.dumps(json.loads((model / name).read_text()) | dict(changes)).encode()


def _with(model: Path, place: Path, name: str, content: bytes) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place)
    (place / name).write_bytes(content)


def _dry_run(model: Path, place: Path, name: str, content: bytes) -> int:
    _with(model, place, name, content)
    return main(["sft", "sft.yaml", f"model.model={place}", "--dry-run"])


def _open(model: Path, place: Path, name: str, content: bytes) -> None:
    """What a job opens before the weights: the check is that of the command, then headers and formats."""
    _with(model, place, name, content)
    read_headers(place)
    teacher_format(place, PromptConfig())
    student_format(place, PromptConfig())
