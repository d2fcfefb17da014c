"""The student's format: question, explanation, solution, spliced from token ids so that every span is known.

In: a problem and the ids of an explanation. Out: the sequence that is scored, or trained on, with its spans. And for a
student that solves by itself: its prompt, what ends its completion, and the completion's text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlt.config.commands.evaluate import QUESTION_FIELD
from megatron_rlt.prompts.stopping import StopCondition
from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.prompts.tokenizer import ChatTokenizer, check_question, check_tags, check_text
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
        prefix = self._opening(problem.question, prefill_thought=True)
        bridge = self.tokenizer.encode(self.tags.student_bridge)
        solution = self.tokenizer.encode(problem.solution)
        ending = [*self.tokenizer.encode(self.tags.solution_close), self.tokenizer.end_of_turn_id]
        explanation = Span(len(prefix), len(prefix) + int(explanation_ids.numel()))
        solution_start = explanation.stop + len(bridge)
        pieces = [torch.tensor(prefix), explanation_ids, torch.tensor(bridge + solution + ending)]
        return SpannedSequence(torch.cat(pieces), (explanation, Span(solution_start, solution_start + len(solution))))

    def sft_sequence(self, problem: Problem, *, whole_turn: bool) -> SpannedSequence:
        """The same sequence around the problem's reasoning trace, with one span that reaches to the end of turn.

        Args:
            whole_turn: begin the span with the assistant's turn, at the thought's opening tag; False leaves the tag
                out and begins with the trace's first token.

        Raises:
            ValueError: the problem, which it names, has no trace; or as `splice`.
        """
        if not problem.reasoning_trace:
            raise ValueError(
                f"problem {problem.problem_id} has no reasoning_trace to train on; drop the row or add one"
            )
        trace = torch.tensor(self.tokenizer.encode(problem.reasoning_trace), dtype=torch.int64)
        spliced = self.splice(problem, trace)
        start = len(self._opening(problem.question, prefill_thought=False)) if whole_turn else spliced.spans[0].start
        return SpannedSequence(spliced.token_ids, (Span(start, len(spliced)),))

    def solving_prompt(self, problem_id: str, question: str, *, prefill_thought: bool) -> Tensor:
        """`[P]` int64: what a student continues that is asked a question and shown nothing else.

        Args:
            problem_id: for the error's text.
            prefill_thought: end with the thought's opening tag, after which a model that was trained on `sft_sequence`
                has learnt to go on; False leaves the tag to the model.

        Raises:
            ValueError: the question holds the text of a special token; it names the problem.
        """
        check_question(self.tokenizer, problem_id, question)
        return torch.tensor(self._opening(question, prefill_thought=prefill_thought))

    def solving_stop(self) -> StopCondition:
        """What ends a student's completion: the end of its turn, no tag."""
        return StopCondition(self.tokenizer, end_tag=None)

    def completion_text(self, token_ids: Sequence[int]) -> str:
        """A sampled completion for people and judges, tags included, the final stop id left out."""
        ended = len(token_ids) > 0 and token_ids[-1] in self.tokenizer.stop_ids
        return self.tokenizer.decode(token_ids[:-1] if ended else token_ids)

    def _opening(self, question: str, *, prefill_thought: bool) -> list[int]:
        """Chat prefix; with `prefill_thought` up to where the explanation begins."""
        tag = self.tokenizer.encode(self.tags.thought_open) if prefill_thought else []
        return self.tokenizer.chat_prefix(self.system, question) + tag


# The user's turn of a question that a student solves: choices listed below it, instructions around it.
#
# In: a question, its choices, a template. Out: text. The chat template and the ids are the student format's.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def asked_text(question: str, choices: Sequence[str], *, template: str) -> str:
    """The question with its choices as lines `A) ...`, in place of `{question}` in the template.

    Args:
        choices: at most 26; none where the question states them itself, or has none.
        template: other braces in it are ordinary text.
    """
    lines = [f"{letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    listed = "\n".join([question, "", *lines]) if lines else question
    return template.replace(QUESTION_FIELD, listed)
