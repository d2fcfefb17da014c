"""rollout_gap.jsonl: one line a step, also after a kill and a resume."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_rlt.store.worst_completions import WORST_FILE, WorstCompletion, WorstCompletions, read_worst_completions


def _worst(gap: float) -> WorstCompletion:
    return WorstCompletion("p", 0, 1, 7, 3, 1.0, gap, 2, 4, 99, "x", -1.0, -1.5, "two\nlines\u2028 and }")


def test_no_step_stands_twice_after_a_resume_and_half_a_line_is_nothing(tmp_path: Path) -> None:
    first = WorstCompletions(tmp_path)
    for step in (1, 2, 3):
        first.log(step, _worst(0.1))
    with (tmp_path / WORST_FILE).open("a") as file:
        file.write('{"step": 4, "prob')  # killed in the middle of a line
    assert [row["step"] for row in read_worst_completions(tmp_path)] == [1, 2, 3]
    second = WorstCompletions(tmp_path)
    assert len(read_worst_completions(tmp_path)) == 3, "a start that takes no step leaves the file alone"
    for step in (3, 4):
        second.log(step, _worst(math.nan))
    rows = read_worst_completions(tmp_path)
    assert [(row["step"], row["gap"]) for row in rows] == [(1, 0.1), (2, 0.1), (3, None), (4, None)]
    assert rows[0]["text"] == "two\nlines\u2028 and }"
