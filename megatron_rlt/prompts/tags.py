"""Tag sets: the strings around explanation and solution, and the system prompts that name them.

Tags are ordinary text, not special tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.config.prompts import PromptConfig

# The teacher must know that the solution is given and that only the explanation is wanted.
TEACHER_SYSTEM = (
    "You are a patient teacher. You are given a question and its correct solution, which stands between"
    " {solution_open} and {solution_close}. Explain to a student how to get from the question to that solution: lay out"
    " the whole reasoning step by step, work out every intermediate result, check it, and look back where a step"
    " could go wrong. Write the explanation between {explanation_open} and {explanation_close}."
)

# After Li et al. (arXiv 2502.07374): long, self-checking thought first, the finished solution second.
STUDENT_SYSTEM = (
    "You are a careful problem solver. Work on each question in two sections. First think: analyse the question,"
    " explore, summarise, verify and revise your ideas in as many steps as you need, between {thought_open} and"
    " {thought_close}. Then give the solution: the final, correct result of that thought with the steps it needs,"
    " clear and complete, between {solution_open} and {solution_close}."
)
_TURN_END = "the end of the turn"  # names the end of the solution in a system prompt if it has no closing tag


@dataclass(frozen=True)
class TagSet:
    """The tags of both formats.

    Teacher: `solution_open SOLUTION solution_close sep explanation_open sep` EXPLANATION `sep explanation_close`.
    Student: `thought_open` EXPLANATION `thought_close sep solution_open` SOLUTION `solution_close`.
    """

    thought_open: str
    thought_close: str  # may be empty
    solution_open: str
    solution_close: str  # may be empty
    explanation_open: str
    explanation_close: str  # the end tag that the teacher writes
    separator: str  # `sep` above; may be empty

    @property
    def texts(self) -> tuple[str, ...]:
        """All non-empty tags; an explanation must contain none of them."""
        tags = (self.thought_open, self.thought_close, self.solution_open, self.solution_close)
        return tuple(tag for tag in (*tags, self.explanation_open, self.explanation_close) if tag)

    @property
    def teacher_prefill(self) -> str:
        """Text after the solution in the teacher's prompt."""
        return f"{self.solution_close}{self.separator}{self.explanation_open}{self.separator}"

    @property
    def teacher_end(self) -> str:
        """Text that a well-behaved teacher writes after its explanation, before the end of turn."""
        return f"{self.separator}{self.explanation_close}"

    @property
    def student_bridge(self) -> str:
        """Text between explanation and solution in the student's sequence."""
        return f"{self.thought_close}{self.separator}{self.solution_open}"

    def system(self, text: str) -> str:
        """Fill the tags into the `{...}` fields of a system prompt."""
        thought_close, solution_close = self.thought_close or self.solution_open, self.solution_close or _TURN_END
        return text.format(**vars(self) | {"thought_close": thought_close, "solution_close": solution_close})


STRATOS = TagSet(
    thought_open="<|begin_of_thought|>",
    thought_close="<|end_of_thought|>",
    solution_open="<|begin_of_solution|>",
    solution_close="<|end_of_solution|>",
    explanation_open="<|begin_of_explanation|>",
    explanation_close="<|end_of_explanation|>",
    separator="\n\n",
)

R1 = TagSet("<think>", "</think>", "<solution>", "</solution>", "<explanation>", "</explanation>", separator="\n\n")


def tag_set(prompts: PromptConfig) -> TagSet:
    """The configured tag set."""
    if prompts.custom_tags is not None:
        return TagSet(**prompts.custom_tags.model_dump())
    return {"stratos": STRATOS, "r1": R1}[prompts.tags]


def teacher_system(prompts: PromptConfig) -> str:
    """The configured text unchanged, else the default with the tags filled in; "" means no system prompt."""
    return tag_set(prompts).system(TEACHER_SYSTEM) if prompts.teacher_system is None else prompts.teacher_system


def student_system(prompts: PromptConfig) -> str:
    """The configured text unchanged, else the default with the tags filled in; "" means no system prompt."""
    return tag_set(prompts).system(STUDENT_SYSTEM) if prompts.student_system is None else prompts.student_system
