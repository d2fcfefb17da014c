"""What a student knows of a solution without an explanation: the baseline that a gain is counted from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.rewards.placebo import nothing
from megatron_rlt.rewards.rlt import SolutionUnit
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import ScoringPair, SpannedSequence


def solution_baselines(
    student: LogprobEngine, student_format: StudentFormat, pairs: Sequence[ScoringPair], unit: SolutionUnit
) -> tuple[Tensor | None, ...]:
    """`[S]` log-probs a pair, of its solution after the question and nothing else; None unless the unit is `gain`.

    Each distinct question with its solution is asked once. Collective: every rank passes the same pairs.
    """
    if unit != "gain":
        return (None,) * len(pairs)
    asked = unexplained(student_format, pairs)
    found = dict(zip(asked, student.logprobs(list(asked.values())).values, strict=True))
    return tuple(found[pair.problem.question, pair.problem.solution] for pair in pairs)


def student_work(
    student: LogprobEngine, student_format: StudentFormat, pairs: Sequence[ScoringPair], unit: SolutionUnit
) -> tuple[int, float]:
    """Tokens that a student reads for the rewards of `pairs`, baselines included, and the model FLOP this takes."""
    baselines = unexplained(student_format, pairs).values() if unit == "gain" else ()
    sequences = [*(pair.student for pair in pairs), *baselines]
    return sum(len(sequence) for sequence in sequences), student.model_flops(sequences)


def unexplained(student_format: StudentFormat, pairs: Sequence[ScoringPair]) -> dict[tuple[str, str], SpannedSequence]:
    """What a student reads without an explanation, by question and solution; each is there once."""
    distinct = {(pair.problem.question, pair.problem.solution): pair for pair in pairs}
    return {key: student_format.splice(pair.problem, nothing(pair.explanation_ids)) for key, pair in distinct.items()}
