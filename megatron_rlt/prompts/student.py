"""The student's format: question, explanation, solution, spliced from token ids so that every span is known.

In: a problem and the ids of an explanation. Out: the sequence that is scored, or trained on, with its spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlt.prompts.checks import check_tags, check_text
from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.prompts.tokenizer import ChatTokenizer
from megatron_rlt.types import Problem, Span, SpannedSequence


class StudentFormat:
    """Builds what the student reads."""

    def __init__(self, tokenizer: ChatTokenizer, tags: TagSet, *, system: str) -> None:
        """`system` "" sends no system prompt. Raises ValueError if tokenizer and tags do not go together."""
        check_tags(tokenizer, tags)
        self.tokenizer = tokenizer
        self.tags = tags
        self.system = system

    def splice(self, problem: Problem, explanation_ids: Tensor) -> SpannedSequence:
        """Student's sequence around `explanation_ids` (`[E]` int64, taken over as they are).

        Two spans: explanation, then solution. The solution is encoded on its own, so its span excludes the tags.
        The closing tag follows the explanation by construction, whether or not the teacher wrote its own.
        Raises ValueError naming the problem if the question holds the text of a special token, or if the
        solution is empty.
        """
        check_text(self.tokenizer, problem)
        prefix = self.tokenizer.chat_prefix(self.system, problem.question)
        prefix += self.tokenizer.encode(self.tags.thought_open)
        bridge = self.tokenizer.encode(self.tags.student_bridge)
        solution = self.tokenizer.encode(problem.solution)
        ending = [*self.tokenizer.encode(self.tags.solution_close), self.tokenizer.end_of_turn_id]
        explanation = Span(len(prefix), len(prefix) + int(explanation_ids.numel()))
        solution_start = explanation.stop + len(bridge)
        pieces = [torch.tensor(prefix), explanation_ids, torch.tensor(bridge + solution + ending)]
        return SpannedSequence(torch.cat(pieces), (explanation, Span(solution_start, solution_start + len(solution))))

    def sft_sequence(self, problem: Problem) -> SpannedSequence:
        """The same sequence around the problem's reasoning trace; one span from its first token to the end of turn.

        Raises ValueError naming the problem if it has no trace, or as `splice` does.
        """
        if not problem.reasoning_trace:
            raise ValueError(
                f"problem {problem.problem_id} has no reasoning_trace to train on; drop the row or add one"
            )
        trace = torch.tensor(self.tokenizer.encode(problem.reasoning_trace), dtype=torch.int64)
        spliced = self.splice(problem, trace)
        return SpannedSequence(spliced.token_ids, (Span(spliced.spans[0].start, len(spliced)),))
