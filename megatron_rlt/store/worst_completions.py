"""`rollout_gap.jsonl` of a run folder: per step, the completion on which sampling engine and trainer disagree most."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.metrics.writer import JsonLines, complete_lines
from megatron_rlt.whole_files import make_folder

WORST_FILE = "rollout_gap.jsonl"


@dataclass(frozen=True)
class WorstCompletion:
    """Which completion, which of its tokens, and what both sides say of that token."""

    problem_id: str
    question_index: int  # within the step's batch
    completion_index: int  # within its group
    seed: int
    policy_version: int  # of the weights that sampled it
    temperature: float
    gap: float  # |rollout - old| at the token, nats
    token_index: int  # within the completion, from 0
    num_tokens: int  # of the completion
    token_id: int
    token_text: str
    rollout_logprob: float
    old_logprob: float
    text: str  # the whole completion


class WorstCompletions:
    """Writes the file, on one rank. A step that is done again replaces its line and those behind it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WORST_FILE
        self._lines: JsonLines | None = None
        self._last_step = 0

    def log(self, step: int, worst: WorstCompletion) -> None:
        """Record a step, counted from 1."""
        if self._lines is None or step <= self._last_step:
            make_folder(self._path.parent)
            self._lines = JsonLines(self._path, resumed_step=step - 1)
        self._lines.log(step, asdict(worst))
        self._last_step = step


def read_worst_completions(folder: Path) -> list[dict[str, Any]]:
    """All steps of a run, oldest first; a number that was not finite is None."""
    return [record for _, record in complete_lines(folder / WORST_FILE)]
