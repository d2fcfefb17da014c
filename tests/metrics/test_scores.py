"""The files of `score`: what is null, which parts count as done, what the summary says."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from megatron_rlt.store.scores import ScoredRow, ScoreStore, summarize_scores
from megatron_rlt.types import FormatFlag, Problem, RewardParts, ScoringPair, Span, SpannedSequence

NAN, INF = math.nan, math.inf


def _row(
    name: str, reward: float, *, r_ss: float = -1.0, dropped: str | None = None, baseline: float = NAN
) -> ScoredRow:
    """Two explanation tokens, one solution token."""
    teacher = SpannedSequence(torch.arange(5), (Span(2, 5),))
    student = SpannedSequence(torch.arange(6), (Span(1, 3), Span(4, 5)))
    flags = frozenset({FormatFlag.CONTAINS_TAGS, FormatFlag.EMPTY})
    pair = ScoringPair(Problem(name, "q", "s"), teacher, student, 2, flags, "")
    two, one = torch.tensor([-0.5, r_ss]), torch.tensor([r_ss])
    parts = RewardParts(reward, r_ss, r_ss, r_ss, 0.5, 0.5, 0.5, -2.0, two, one, two, two)
    return ScoredRow(pair, parts, dropped, baseline, r_ss - baseline)


def test_parts_become_one_file_in_order_with_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "deep" / "scores.parquet", {"alpha": 0.01})
    assert not store.is_finished()
    assert store.begin() == 0
    store.write_part(0, [_row("b", -3.0), _row("a", NAN, r_ss=-INF, dropped="non-finite KL")])
    store.write_part(1, [_row("c", -5.0, baseline=-4.0)])
    assert ScoreStore(store.output, {"alpha": 0.01}).begin() == 2
    assert store.rewards(2) == (["q", "q", "q"], [-3.0, None, -5.0])
    store.finish(2, [1, None, 2])

    rows = pq.read_table(store.output).to_pylist()
    assert [row["id"] for row in rows] == ["b", "a", "c"]
    assert [row["reward"] for row in rows] == [-3.0, None, -5.0]
    assert (rows[1]["r_ss"], rows[1]["student_solution_logprobs"]) == (-INF, [-INF])
    assert [row["dropped"] for row in rows] == [None, "non-finite KL", None]
    assert (rows[0]["explanation_tokens"], rows[0]["solution_tokens"]) == (2, 1)
    assert [row["rank"] for row in rows] == [1, None, 2]
    assert [(row["baseline_logprob"], row["gain"]) for row in rows] == [(None, None), (None, None), (-4.0, 3.0)]
    assert rows[0]["flags"] == ["contains_tags", "empty"]
    assert store.is_finished()
    assert not store.parts.exists()
    summary = summarize_scores(store.output)
    assert (summary.num_rows, summary.dropped) == (3, {"non-finite KL": 1})
    assert (summary.means["reward"], summary.means["r_ss"], summary.means["penalty"]) == (-4.0, -1.0, -2.0)
    assert (summary.means["baseline_logprob"], summary.means["gain"]) == (-4.0, 3.0)
    assert summary.flags == {FormatFlag.EMPTY: 3, FormatFlag.CONTAINS_TAGS: 3}


def test_parts_count_up_to_the_first_gap_or_damage(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.parquet", {})
    store.begin()
    for number in range(4):
        store.write_part(number, [_row(str(number), -1.0)])
    (store.parts / "part-000003.parquet").write_bytes(b"PAR1")
    assert store.begin() == 3
    (store.parts / "part-000001.parquet").unlink()
    assert store.begin() == 1


def test_values_that_json_cannot_tell_apart_are_the_same_identity(tmp_path: Path) -> None:
    ScoreStore(tmp_path / "scores.parquet", {"sizes": (1, 2), "alpha": 0.1, "none": None}).begin()
    assert not ScoreStore(tmp_path / "scores.parquet", {"sizes": [1, 2], "alpha": 0.1, "none": None}).is_finished()
    with pytest.raises(ValueError, match=r"another scoring run: alpha was 0\.1, now 0\.2; none was None, now 3\. "):
        ScoreStore(tmp_path / "scores.parquet", {"sizes": [1, 2], "alpha": 0.2, "none": 3}).is_finished()
