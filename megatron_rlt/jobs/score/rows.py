"""The explanations that `score` reads from its input, and which of its rows can be scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rlt.config.reward import Control as Control
from megatron_rlt.data.rejection import RejectReason, UnusableRowError, rejected_as
from megatron_rlt.data.traces import Trace, read_traces
from megatron_rlt.jobs.collect.identity import Origin
from megatron_rlt.jobs.collect.scoring import Explanation, pair_to_read
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.control import other_questions
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.store.explanation_row import StoredExplanation


@dataclass(frozen=True, eq=False)
class TraceReader:
    """Makes explanations that can be scored of the rows of a file."""

    pairs: PairBuilder
    control: Control
    temperature: float
    seed: int
    origin: Origin
    others: Mapping[int, str]  # by a trace's row: another question's explanation; only for `other_question`

    @staticmethod
    def numbered(traces: Iterable[Trace]) -> Iterator[tuple[Trace, int, int]]:
        """Each trace with the index of its question in the file, and its own among those of that question."""
        questions: dict[str, int] = {}
        seen: Counter[int] = Counter()
        for trace in traces:
            question = questions.setdefault(trace.problem.question, len(questions))
            yield trace, question, seen[question]
            seen[question] += 1

    def explanation(self, trace: Trace, question_index: int, explanation_index: int) -> Explanation:
        """Raise ValueError for a row that no prompt can be made of."""
        pair = self.pairs.pair_from_text(trace.problem, trace.explanation)
        row = StoredExplanation.of_pair(
            pair, question_index=question_index, explanation_index=explanation_index, temperature=self.temperature
        )
        other = self.others.get(trace.row)
        return Explanation(
            replace(row, row=trace.row, **asdict(self.origin)),
            pair,
            control_seed=completion_seed(self.seed, 0, trace.row, 0),
            other_ids=None if other is None else self.pairs.explanation_ids(other),
        )


def other_explanations(file: Path, *, seed: int) -> dict[int, str]:
    """Another question's explanation per trace's row, all in memory; ValueError if unreadable or there is no other."""
    traces = [row for row in read_traces(file) if isinstance(row, Trace)]
    places = other_questions([trace.problem.question for trace in traces], seed=seed)
    return {trace.row: traces[place].explanation for trace, place in zip(traces, places, strict=True)}


def check_lengths(reader: TraceReader, *, teacher: int, student: int) -> Callable[[Trace], None]:
    """The check that both models, whose longest sequences are given in tokens, can read what becomes of a trace."""

    def check(trace: Trace) -> None:
        """Raise UnusableRowError for a row that no prompt can be made of, or that is too long for a model."""
        with rejected_as(RejectReason.UNUSABLE_PROMPT):
            pair, _ = pair_to_read(reader.pairs, reader.control, reader.explanation(trace, 0, 0))
        for name, sequence, limit in (("teacher", pair.teacher, teacher), ("student", pair.student, student)):
            if len(sequence) > limit:
                detail = f"the {name}'s sequence has {len(sequence)} tokens, its model reads {limit} at most"
                raise UnusableRowError(RejectReason.TOO_LONG, None, detail)

    return check
