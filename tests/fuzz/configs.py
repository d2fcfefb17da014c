"""Configurations that are malformed: YAML text, values, overrides; and what a launcher may set in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from megatron_rlt.cli import main
from megatron_rlt.parallel.environment import given_place
from tests.config.valid import VALID
from tests.fuzz.mutations import FORGING, mutated_bytes
from tests.fuzz.outcome import Attempt

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# Text that YAML reads as something else than it says, or that costs more than it is worth. Each must be refused.
NEVER_RIGHT = (
    "num_steps: 010",
    "num_steps: -010",
    "num_steps: 0_10",
    "num_steps: 1:30",
    "temperature: 1:30.5",
    "num_steps: 1_0:30",
    "grpo: {group_size: 010}",
    "num_steps: 0777777777777",
    "seed: 00",
    "num_steps: .inf",
    "temperature: .nan",
    "optimizer: {lr: .inf}",
    "temperature: -1",
    "temperature: 0",
    "temperature: 1e999",
    "num_steps: 1.5",
    "num_steps: yes",
    "num_steps: '8'",
    "num_steps: 2024-01-01",
    "num_steps: !!python/name:os.system",
    "x: !!binary aGk=",
    "num_steps: 1\nnum_steps: 2",
    "*a",
    "&a [*a]",
    "a: &a {b: *a}",
    "- 1",
    "5",
    "? [a]\n: 1",
    "1: 2",
    "null: 1",
    "[" * 3000,
    "[" * 3000 + "]" * 3000,
    "x: " + "{a: " * 3000 + "}" * 3000,
    "x:\n" + "".join(" " * n + "-\n" for n in range(400)),
    "\n".join(" " * n + "a:" for n in range(1500)),
    _BOMB,
    _MERGES,
    "\t- a",
    "a: b: c",
    "a: 'x",
    '"\\x"',
    "%YAML 9.9\n---\na: 1",
    "---\na: 1\n---\nb: 2",
    "a: \0",
    "a: \x1b[2J",
    "\ufeff\ufeffa: 1",
    f'"{FORGING.encode("unicode_escape").decode()}": 1',
    f'data: {{path: "{FORGING.encode("unicode_escape").decode()}"}}',
    "<<: 5",
    "<<: [1]",
    "=: 1",
    "!!set {a, b}",
    "num_steps: !!int x",
    "temperature: !!float x",
    "num_steps: !!timestamp x",
    "num_steps: 0b",
    "x: !!omap [a: 1]",
    "x: !!pairs [a]",
    "num_steps: 0x",
    "num_steps: 9999-99-99",
    "num_steps: 2001-02-30",
    "num_steps: 2001-01-01 25:61:61",
)

_HUGE = (
    "10**30",
    "1" + "0" * 30,
    "1" + "0" * 5000,
    "-1" + "0" * 30,
    "9223372036854775808",
    "4294967296",
    "1e30",
    "1e400",
)
_KEYS = (
    "world_size",
    "num_steps",
    "seed",
    "grpo.group_size",
    "grpo.questions_per_step",
    "prompts.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.max_batch_size",
    "rollout.max_prefill_tokens",
    "teacher.layout.tp",
    "teacher.layout.pp",
    "student.layout.cp",
    "scoring.vocab_block",
    "scoring.max_tokens_per_pack",
    "checkpoint.interval_steps",
    "rollout.vllm.server.bucket_bytes",
    "data.num_workers",
    "rollout.vllm.kv_cache_bytes",
    "data.shuffle_buffer_size",
)
# No run can have them. Each must be refused.
TOO_LARGE = (
    ("world_size=" + _HUGE[1],),
    ("grpo.group_size=1000000000",),
    ("temperature=1e-30",),
    ("temperature=1e300",),
    ("grpo.questions_per_step=1000000007", "grpo.group_size=1000000007"),
    ("grpo.questions_per_step=1000003", "grpo.updates_per_batch=7"),
    ("world_size=999999999989",),
    ("teacher.layout.tp=2147483647", "world_size=2147483647"),
    ("optimizer.lr=1e300",),
    ("optimizer.weight_decay=1e300",),
    ("watchdog.timeout_seconds=1e300",),
    ("temperature=1e-300",),
    ("temperature=0.0",),
    ("temperature=-0.0",),
    *((f"{key}={value}",) for value in _HUGE for key in _KEYS),
)
_OVERRIDES = (
    "x",
    "=",
    "=1",
    "a.=1",
    ".a=1",
    "..=1",
    "num_steps",
    "num_steps=",
    "num_steps=[",
    "num_steps={a",
    "num_steps=*x",
    "num_steps=!!python/x y",
    "num_steps=010",
    "num_steps=1:30",
    f"num_steps={FORGING}",
    f"{FORGING}=1",
    f"output_dir={FORGING}",
    f"data.path={FORGING}",
    "\0=1",
    "output_dir=\0",
    "output_dir=" + "x" * 5000,
    "output_dir=/dev/null/x",
    "output_dir=" + "a/" * 3000,
    "num_steps.a.b.c=1",
    "a" * 9000 + "=1",
    ".".join("a" * 3000) + "=1",
    "teacher=5",
    "teacher=[1]",
    "teacher=null",
    "grpo=",
    "prompts=[]",
    "num_steps=" + "[" * 3000,
    "num_steps=\ud800",
    "output_dir=\ud800",
    "student.model=\ud800",
    "teacher.model=" + "x" * 300,
    "teacher.model=/dev/null",
    "teacher.model=train.yaml",
    "data.path=/dev/null",
    "data.path=.",
    "data.path=",
    "output_dir=train.yaml",
    f"teacher.model={FORGING}",
    "reward.terms=5",
    "metrics=true",
    "rollout.engine=x",
    "rollout.vllm.server.addresses=[5]",
    "rollout.vllm.server.api_key_file=/dev/null",
    "rollout.vllm.server.addresses=['http://a:b@c']",
    "prompts.teacher_system=\ud800",
    f"prompts.teacher_system={FORGING}",
)
_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
)
_SETTINGS = ("", " ", "x", "-1", "0", "1", "2", "8", "1.5", "1e3", "0x1", "010", "٣", "9" * 30, FORGING, "1\n", "NaN")


_TRAIN_KEYS = ("num_steps", "temperature", "seed", "optimizer", "grpo")  # a text of theirs is tried among sound ones


def yaml_texts() -> Iterator[Attempt]:
    """Files of every command, without end."""
    random, number = Random(3), 0
    for command in sorted(VALID):
        yield Attempt(f"{command}: untouched", partial(_file, command, VALID[command].encode()), must_accept=True)
    for text in NEVER_RIGHT:
        key = text.partition(":")[0]
        rest = [line for line in VALID["train"].splitlines() if line.partition(":")[0] != key]
        content = "\n".join([*rest, text, ""]) if key in _TRAIN_KEYS else text
        yield Attempt(f"{text[:60]!r}", partial(_file, "train", content.encode("utf-8", "surrogatepass")), True)
    while True:
        number += 1
        command = random.choice(sorted(VALID))
        yield Attempt(
            f"{command}: mutation {number}", partial(_file, command, mutated_bytes(VALID[command].encode(), random))
        )


def values() -> Iterator[Attempt]:
    """Huge and tiny values, alone and together, without end."""
    random = Random(4)
    yield Attempt("untouched", partial(_override, "train", ()), must_accept=True)
    for words in TOO_LARGE:
        yield Attempt(str(words)[:90], partial(_override, "train", words), must_refuse=True)
    while True:
        words = tuple(word for one in random.sample(TOO_LARGE, 2) for word in one)
        command = random.choice(("train", "rlvr"))
        yield Attempt(str(words)[:180], partial(_override, command, words), must_refuse=True)


def overrides() -> Iterator[Attempt]:
    """Words behind the configuration, without end; the first ones are all refused or mean what they say."""
    random = Random(5)
    yield Attempt("harmless", partial(_override, "train", ("num_steps=7", "output_dir=a: b #c")), must_accept=True)
    for word in _OVERRIDES:
        yield Attempt(f"{word[:80]!r}", partial(_override, "train", (word,)))
    while True:
        words = [random.choice(_OVERRIDES)]
        if random.randrange(2):
            place = random.randrange(len(words[0]) + 1)
            words = [words[0][:place] + random.choice((".", "=", "[", "'", "\n", "#", "\x1b", "é")) + words[0][place:]]
        command = random.choice(("train", "sft", "evaluate", "score", "collect", "prepare"))
        yield Attempt(f"{command} {words[0][:80]!r}", partial(_override, command, tuple(words)))


def variables() -> Iterator[Attempt]:
    """What stands in the environment of a rank, without end."""
    random = Random(6)
    yield Attempt("torchrun's", partial(_place, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}), must_accept=True)
    while True:
        given = {name: random.choice(_SETTINGS) for name in random.sample(_VARIABLES, random.randrange(2, 8))}
        yield Attempt(str(given), partial(_place, given))


def _file(command: str, content: bytes) -> int:
    Path("fuzzed.yaml").write_bytes(content)
    return main([command, "fuzzed.yaml", "--dry-run"])


def _override(command: str, words: tuple[str, ...]) -> int:
    return main([command, f"{command}.yaml", "--dry-run", "--", *words])


def _place(given: dict[str, str]) -> None:
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    os.environ.update(given)
    try:
        given_place()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
