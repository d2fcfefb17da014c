"""Tag sets: the strings around explanation and solution, and the system prompts that name them.

In: the `prompts` section of a configuration. Out: one `TagSet`. The tags are ordinary text, not special tokens;
how they become ids is the formats' concern.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.config.sections import PromptConfig

# A teacher must know that the solution is already there and that only the explanation is wanted.
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


@dataclass(frozen=True)
class TagSet:
    """The strings of both formats.

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
        """All tags that are not empty; none of them belongs into an explanation."""
        tags = (self.thought_open, self.thought_close, self.solution_open, self.solution_close)
        return tuple(tag for tag in (*tags, self.explanation_open, self.explanation_close) if tag)

    @property
    def teacher_prefill(self) -> str:
        """What follows the solution in the teacher's prompt; the solution is preceded by `solution_open`."""
        return f"{self.solution_close}{self.separator}{self.explanation_open}{self.separator}"

    @property
    def teacher_end(self) -> str:
        """What a well-behaved teacher writes after its explanation, before the end of its turn."""
        return f"{self.separator}{self.explanation_close}"

    @property
    def student_bridge(self) -> str:
        """What stands between explanation and solution in the student's text."""
        return f"{self.thought_close}{self.separator}{self.solution_open}"

    def system(self, text: str) -> str:
        """A system prompt with this set's tags filled into its `{...}` fields."""
        return text.format(
            thought_open=self.thought_open,
            thought_close=self.thought_close or self.solution_open,
            solution_open=self.solution_open,
            solution_close=self.solution_close or "the end of the turn",
            explanation_open=self.explanation_open,
            explanation_close=self.explanation_close,
        )


STRATOS = TagSet(
    thought_open="<|begin_of_thought|>",
    thought_close="<|end_of_thought|>",
    solution_open="<|begin_of_solution|>",
    solution_close="<|end_of_solution|>",
    explanation_open="<|begin_of_explanation|>",
    explanation_close="<|end_of_explanation|>",
    separator="\n\n",
)


R1 = TagSet(
    thought_open="<think>",
    thought_close="</think>",
    solution_open="<solution>",
    solution_close="</solution>",
    explanation_open="<explanation>",
    explanation_close="</explanation>",
    separator="\n\n",
)


def tag_set(prompts: PromptConfig) -> TagSet:
    """The tag set that a configuration asks for."""
    if prompts.custom_tags is not None:
        return TagSet(**prompts.custom_tags.model_dump())
    return {"stratos": STRATOS, "r1": R1}[prompts.tags]


def teacher_system(prompts: PromptConfig) -> str:
    """The teacher's system prompt: the configured text as it stands, or the default with the set's tags; "" is none."""
    return tag_set(prompts).system(TEACHER_SYSTEM) if prompts.teacher_system is None else prompts.teacher_system


def student_system(prompts: PromptConfig) -> str:
    """The student's system prompt: the configured text as it stands, or the default with the set's tags; "" is none."""
    return tag_set(prompts).system(STUDENT_SYSTEM) if prompts.student_system is None else prompts.student_system
