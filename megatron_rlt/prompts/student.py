"""The student's format: question, explanation, solution, spliced from token ids so that every span is known.

It builds the sequences that are scored or trained on, and the prompt of a student that solves a question by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import torch
from torch import Tensor

from megatron_rlt.config.commands.evaluation_sets import QUESTION_FIELD
from megatron_rlt.prompts.stopping import StopCondition
from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.prompts.template_checks import check_tags, check_template
from megatron_rlt.prompts.tokenizer import ChatTokenizer, check_question, check_text, required_trace
from megatron_rlt.types import Problem, Span, SpannedSequence


class StudentFormat:
    """Builds the student's sequences and prompts."""

    def __init__(self, tokenizer: ChatTokenizer, tags: TagSet, *, system: str) -> None:
        """`system` "" sends no system prompt. Raises ValueError if tokenizer and tags do not go together."""
        check_template(tokenizer, system=system, system_key="prompts.student_system")
        check_tags(tokenizer, tags)
        self.tokenizer, self.tags, self.system = tokenizer, tags, system

    def splice(self, problem: Problem, explanation_ids: Tensor) -> SpannedSequence:
        """Build the student's sequence around `explanation_ids` (`[E]` int64, unchanged).

        Two spans: explanation, then the tokens that lie wholly between the solution's tags. The closing tag always
        follows the explanation, whether or not the teacher wrote its own. Raises ValueError naming the problem if the
        question contains a special token's text, or if the solution is empty.
        """
        check_text(self.tokenizer, problem)
        prefix = self._opening(problem.question, prefill_thought=True)
        tail, (_, solution, _) = self.tokenizer.encode_joined(*self._after_explanation(problem))
        tail_start = len(prefix) + int(explanation_ids.numel())
        pieces = [torch.tensor(prefix), explanation_ids, torch.tensor([*tail, self.tokenizer.end_of_turn_id])]
        spans = Span(len(prefix), tail_start), Span(tail_start + solution.start, tail_start + solution.stop)
        return SpannedSequence(torch.cat(pieces), spans)

    def splice_text(self, problem: Problem, explanation: str) -> SpannedSequence:
        """Build the same sequence around an explanation's text: its tokens are those of the whole text."""
        check_text(self.tokenizer, problem)
        prefix = self._opening(problem.question, prefill_thought=True)
        ids, spans = self.tokenizer.encode_joined(explanation, *self._after_explanation(problem))
        read, _, solution, _ = (Span(len(prefix) + span.start, len(prefix) + span.stop) for span in spans)
        return SpannedSequence(torch.tensor([*prefix, *ids, self.tokenizer.end_of_turn_id]), (read, solution))

    def sft_sequence(self, problem: Problem, *, whole_turn: bool) -> SpannedSequence:
        """Build the sequence of the reasoning trace, with one span that ends at the end of turn.

        With `whole_turn` the span begins at the thought's opening tag, else at the trace's first token.
        Raises ValueError naming the problem if it has no trace, or as `splice` does.
        """
        trace = self.tags.bare(required_trace(problem)) + self.tags.thought_end
        sequence = self.splice_text(problem, trace)
        opening = self._opening(problem.question, prefill_thought=not whole_turn)
        return SpannedSequence(sequence.token_ids, (Span(len(opening), len(sequence)),))

    def solving_prompt(self, problem_id: str, question: str, *, prefill_thought: bool) -> Tensor:
        """`[P]` int64: the prompt for answering a question without an explanation.

        `prefill_thought` ends it with the thought's opening tag and its padding, as in `sft_sequence`; otherwise the
        model writes both. Raises ValueError naming `problem_id` if the question contains the text of a special token.
        """
        check_question(self.tokenizer, problem_id, question)
        return torch.tensor(self._opening(question, prefill_thought=prefill_thought))

    def solving_stop(self) -> StopCondition:
        """Stop condition of a student's completion: the end of turn, no tag."""
        return StopCondition(self.tokenizer, end_tag=None)

    def completion_text(self, token_ids: Sequence[int]) -> str:
        """Decode a sampled completion, tags included, without its final stop id."""
        ended = len(token_ids) > 0 and token_ids[-1] in self.tokenizer.stop_ids
        return self.tokenizer.decode(token_ids[:-1] if ended else token_ids)

    def _opening(self, question: str, *, prefill_thought: bool) -> list[int]:
        """Chat prefix, with `prefill_thought` plus the thought's opening tag and its padding."""
        opening = self.tokenizer.encode(self.tags.thought_opening) if prefill_thought else []
        return self.tokenizer.chat_prefix(self.system, question) + opening

    def _after_explanation(self, problem: Problem) -> tuple[str, str, str]:
        """Texts up to the solution, of the solution, and after it."""
        return self.tags.student_bridge, self.tags.student_solution(problem.solution), self.tags.student_end


def asked_text(question: str, choices: Sequence[str], *, template: str) -> str:
    """The user's message: the question and up to 26 choices as lines `A) ...`, in place of `{question}`.

    Other braces of the template are ordinary text.
    """
    lines = [f"{letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    listed = "\n".join([question, "", *lines]) if lines else question
    return template.replace(QUESTION_FIELD, listed)
