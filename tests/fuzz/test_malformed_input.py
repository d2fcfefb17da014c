"""Malformed input is refused in lines that say why, or legal: no traceback, no hang, no forged line.

`FUZZ_INPUTS=5000` (`make fuzz N=5000`) runs more inputs than the 1000 of a plain run, always in the
same order.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.config.valid import VALID
from tests.fuzz import checkpoints
from tests.fuzz.configs import overrides, values, variables, yaml_texts
from tests.fuzz.data import papers, rows, shards, stores
from tests.fuzz.models import model_folders, tokenizers
from tests.fuzz.outcome import Attempt, Outcome, outcome_of
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

_INPUTS = int(os.environ.get("FUZZ_INPUTS", "1000"))
_SHOWN = 15

# Share of all inputs, in percent, and where a group begins: in the model's folder or in an empty one.
GROUPS: dict[str, tuple[int, Callable[[Path], Iterator[Attempt]]]] = {
    "model folders": (24, model_folders),
    "tokenizers and templates": (8, tokenizers),
    "YAML": (15, lambda _: yaml_texts()),
    "values": (10, lambda _: values()),
    "overrides": (9, lambda _: overrides()),
    "launcher variables": (4, lambda _: variables()),
    "rows": (11, rows),
    "shards": (4, shards),
    "run folders": (8, papers),
    "stores": (3, stores),
}
CHECKPOINTS_SHARE = 4  # on a rank of its own


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid configuration a command, and the model and rows that it names."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny_hf_model(tiny_tokenizer(folder / "teacher"), "qwen2", tied=True, vocab_size=400, num_layers=2)
    (model / "generation_config.json").write_text('{"eos_token_id": 394}')
    (folder / "student").symlink_to("teacher")
    (folder / "rows.jsonl").write_text('{"question": "1+1?", "solution": "2"}\n')
    (folder / "questions.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    for command, text in VALID.items():
        (folder / f"{command}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("group", GROUPS)
def test_malformed_input_is_refused_or_legal(group: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    share, attempts = GROUPS[group]
    place = workplace / "teacher" if group in ("model folders", "tokenizers and templates") else workplace
    _require_clean(group, ((one.what, outcome_of(one)) for one in islice(attempts(place), _INPUTS * share // 100)))


def test_malformed_checkpoints_are_refused_or_legal(tmp_path: Path) -> None:
    model = tiny_hf_model(
        tmp_path / "hf", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2
    )
    (found,) = run_ranks(checkpoints.outcomes, 1, model, tmp_path, _INPUTS * CHECKPOINTS_SHARE // 100)
    _require_clean("checkpoints", found)


def _require_clean(group: str, found: Iterable[tuple[str, Outcome]]) -> None:
    kinds: Counter[str] = Counter()
    faults, slowest = [], 0.0
    for what, outcome in found:
        kinds[outcome.kind] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.fault is not None:
            faults.append(f"{what}: {outcome.fault}")
    total = sum(kinds.values())
    counts = f"{kinds['refused']} refused, {kinds['legal']} legal, {kinds['failed']} failed"
    print(f"{group}: {total} inputs, {counts}; slowest {slowest:.1f} s")
    assert not faults, f"{len(faults)} of {total}:\n" + "\n".join(faults[:_SHOWN])


def test_the_shares_are_of_all_inputs() -> None:
    assert sum(share for share, _ in GROUPS.values()) + CHECKPOINTS_SHARE == 100
    assert _INPUTS >= 400
