"""Columns of the campaign that are test suites: each runs as a `pytest` of its own, whose counts are read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.preloaded import ROOT

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
_FUZZED = re.compile(r"^\.?([\w ]+): (\d+) inputs, (\d+) refused, (\d+) legal, (\d+) failed", re.MULTILINE)
_TIMEOUT_SECONDS = 1500.0


@dataclass(frozen=True)
class Suite:
    """One call of pytest."""

    name: str
    what: str  # that a row of the table counts
    tests: tuple[str, ...]
    needs_vllm: bool = False

    @property
    def command(self) -> str:
        """As a reader types it."""
        program = VLLM_PYTHON.relative_to(ROOT).with_name("pytest") if self.needs_vllm else "pytest"
        return f"{program} {' '.join(self.tests)}"


SUITES = (
    Suite("crafted", "tests that open a crafted or damaged file", ("tests/trust",)),
    Suite("disks", "tests of full and faulty disks, quotas, locks, and of writers killed one by one", ("tests/disk",)),
    Suite("guards", "tests that end ranks, launchers and guards of servers", (
        "tests/rollout/test_server_guard.py", "tests/parallel/test_launch.py", "tests/parallel/test_silence.py")),
    Suite("servers", "tests with faults of vLLM's servers and their trainer", (
        "tests/vllm/test_lost_servers.py", "tests/vllm/test_broken_syncs.py", "tests/vllm/test_killed_trainer.py",
        "tests/vllm/test_sockets.py"), needs_vllm=True),
)  # fmt: skip
FUZZ = "tests/fuzz"


@dataclass(frozen=True)
class Counts:
    """What a suite came to."""

    passed: int
    skipped: int
    faults: tuple[str, ...]


def run_suite(suite: Suite) -> Counts | None:
    """Run it; None where vLLM is needed and not there."""
    if suite.needs_vllm and not VLLM_PYTHON.exists():
        return None
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        python = str(VLLM_PYTHON if suite.needs_vllm else sys.executable)
        ended = _pytest(python, [*suite.tests, f"--junitxml={report}"], {})
        if not report.exists():
            return Counts(0, 0, (_end_of(ended),))
        tests = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{test.get('classname')}: {test.get('name')}" for test in tests if _has(test, "failure", "error")]
    skipped = sum(_has(test, "skipped") for test in tests)
    return Counts(len(tests) - len(failed) - skipped, skipped, tuple(failed))


def run_fuzzer(num_inputs: int) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Malformed inputs: by group how many were refused, legal, failed; and faults."""
    ended = _pytest(sys.executable, ["-s", FUZZ], {"FUZZ_INPUTS": str(num_inputs)})
    groups = {
        match[1].strip(): {"inputs": int(match[2]), "refused": int(match[3]), "legal": int(match[4])}
        for match in _FUZZED.finditer(ended.stdout)
    }
    return groups, [] if ended.returncode == 0 and groups else [_end_of(ended)]


def _pytest(python: str, arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [python, "-m", "pytest", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )


def _end_of(ended: subprocess.CompletedProcess[str]) -> str:
    return f"pytest ended with status {ended.returncode}: {ended.stdout[-1500:]} {ended.stderr[-300:]}"


def _has(test: ElementTree.Element, *names: str) -> bool:
    return any(test.find(name) is not None for name in names)
