"""The teacher's format: the prompt shows question and solution and ends with the opening tag of the explanation."""

from __future__ import annotations

import torch

from megatron_rlt.prompts.stopping import StopCondition
from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.prompts.template_checks import check_tags, check_template
from megatron_rlt.prompts.tokenizer import ChatTokenizer, check_text, required_trace
from megatron_rlt.types import Problem, Prompt, Span, SpannedSequence


class TeacherFormat:
    """Builds the teacher's prompts and its warm-up (SFT) sequences."""

    def __init__(self, tokenizer: ChatTokenizer, tags: TagSet, *, system: str, max_prompt_tokens: int) -> None:
        """`system` "" sends no system prompt. Raises ValueError if tokenizer and tags do not go together."""
        check_template(tokenizer, system=system, system_key="prompts.teacher_system")
        check_tags(tokenizer, tags)
        self.tokenizer, self.tags, self.system = tokenizer, tags, system
        self.max_prompt_tokens = max_prompt_tokens

    def prompt(self, problem: Problem) -> Prompt:
        """Chat prefix and pre-filled solution, up to where the explanation begins.

        Raises ValueError naming the problem if the prompt is longer than `max_prompt_tokens`, or as `check_text` does.
        """
        check_text(self.tokenizer, problem)
        prefill = self.tokenizer.encode(self.tags.teacher_prefill(problem.solution))
        token_ids = self.tokenizer.chat_prefix(self.system, problem.question) + prefill
        if len(token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"problem {problem.problem_id}: its teacher prompt has {len(token_ids)} tokens, more than"
                f" prompts.max_prompt_tokens = {self.max_prompt_tokens}; drop the row or raise the limit"
            )
        return Prompt(problem, torch.tensor(token_ids))

    def completion(self, explanation: str) -> tuple[list[int], int]:
        """A completion as a well-behaved teacher writes it: its ids, and how many of them are the explanation's.

        All is encoded in one call, and the white space before the end tag is the explanation's, as in a sampled
        completion. White space that the prompt ends with is not written again.
        """
        bare, end_tag = self.tags.bare(explanation), self.tags.explanation_close
        padded = f"{bare}{self.tags.padding}" if bare else ""
        ids, (span, _) = self.tokenizer.encode_joined(padded, end_tag)
        return [*ids, self.tokenizer.end_of_turn_id], span.stop

    def ending(self, explanation: str) -> list[int]:
        """Ids that close an explanation whose ids are given: white space that it lacks, end tag, end of turn."""
        is_padded = not explanation or explanation.endswith(self.tags.padding)
        end = self.tags.explanation_close if is_padded else self.tags.teacher_end
        return [*self.tokenizer.encode(end), self.tokenizer.end_of_turn_id]

    def sft_sequence(self, problem: Problem) -> SpannedSequence:
        """Prompt and reasoning trace; the span covers trace, end tag and end of turn.

        Raises ValueError naming the problem if it has no trace, or as `prompt` does.
        """
        completion, _ = self.completion(required_trace(problem))
        prompt_ids = self.prompt(problem).token_ids
        token_ids = torch.cat([prompt_ids, torch.tensor(completion)])
        return SpannedSequence(token_ids, (Span(len(prompt_ids), len(token_ids)),))

    def stop_condition(self, *, stop_at_end_tag: bool) -> StopCondition:
        """Stop condition of a sampled completion: a stop id, optionally also the end tag."""
        return StopCondition(self.tokenizer, self.tags.explanation_close if stop_at_end_tag else None)
