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
    " clear and complete, {solution_place}."
)
_TURN_END = "the end of the turn"  # names the end of the solution in a system prompt if it has no closing tag


@dataclass(frozen=True)
class TagSet:
    """The tags of both formats, and the white space between them and the text.

    Teacher: `[solution] sep [explanation]`. Student: `[thought] sep [solution]`. A section `[...]` is
    `open pad TEXT pad close`. An empty closing tag stands without its padding.
    """

    thought_open: str
    thought_close: str  # may be empty
    solution_open: str
    solution_close: str  # may be empty
    explanation_open: str
    explanation_close: str  # the end tag that the teacher writes
    separator: str  # `sep` above; may be empty
    padding: str  # `pad` above; may be empty
    student_solution_tags: bool  # False: the student's solution is all that follows `thought_close sep`

    @property
    def texts(self) -> tuple[str, ...]:
        """All non-empty tags; an explanation must contain none of them."""
        tags = (self.thought_open, self.thought_close, self.solution_open, self.solution_close)
        return tuple(tag for tag in (*tags, self.explanation_open, self.explanation_close) if tag)

    def bare(self, text: str) -> str:
        """A section's text without the white space at its ends that the format writes: it must not stand there twice.

        Rows of Bespoke-Stratos bring their newlines, other rows do not.
        """
        written = max(self.separator, self.padding, key=len)
        return _without_end(_without_start(text, written), written)

    def teacher_prefill(self, solution: str) -> str:
        """The assistant's text up to where the explanation begins."""
        shown = f"{self.solution_open}{self.padding}{self.bare(solution)}{self._end(self.solution_close)}"
        return f"{shown}{self.separator}{self.explanation_open}{self.padding}"

    @property
    def teacher_end(self) -> str:
        """Text that a well-behaved teacher writes after its explanation, before the end of turn."""
        return self._end(self.explanation_close)

    @property
    def thought_opening(self) -> str:
        """The student's text before the explanation."""
        return f"{self.thought_open}{self.padding}"

    @property
    def thought_end(self) -> str:
        """The student's text between an explanation without padding and `student_bridge`."""
        return self.padding if self.thought_close else ""

    @property
    def student_bridge(self) -> str:
        """Text between explanation, with its padding, and solution in the student's sequence."""
        opening = self.solution_open if self.student_solution_tags else ""
        return f"{self.thought_close}{self.separator}{opening}"

    def student_solution(self, solution: str) -> str:
        """The student's solution section, without tags."""
        if not self.student_solution_tags:
            return self.bare(solution)
        return f"{self.padding}{self.bare(solution)}{self.padding if self.solution_close else ''}"

    @property
    def student_end(self) -> str:
        """The student's text after the solution, before the end of turn."""
        return self.solution_close if self.student_solution_tags else ""

    def system(self, text: str) -> str:
        """Fill the tags into the `{...}` fields of a system prompt."""
        closing = self.solution_close or _TURN_END
        tagged = f"between {self.solution_open} and {closing}"
        place = tagged if self.student_solution_tags else f"after {self.thought_close}"
        thought_close = self.thought_close or self.solution_open
        fields = {"thought_close": thought_close, "solution_close": closing, "solution_place": place}
        return text.format(**vars(self) | fields)

    def _end(self, tag: str) -> str:
        return f"{self.padding}{tag}" if tag else ""


def _without_start(text: str, written: str) -> str:
    """Cut off the longest start that `written` ends with."""
    return next(text[size:] for size in range(len(written), -1, -1) if text.startswith(written[len(written) - size :]))


def _without_end(text: str, written: str) -> str:
    """Cut off the longest end that `written` begins with."""
    return next(text[: len(text) - size] for size in range(len(written), -1, -1) if text.endswith(written[:size]))


STRATOS = TagSet(
    thought_open="<|begin_of_thought|>",
    thought_close="<|end_of_thought|>",
    solution_open="<|begin_of_solution|>",
    solution_close="<|end_of_solution|>",
    explanation_open="<|begin_of_explanation|>",
    explanation_close="<|end_of_explanation|>",
    separator="\n\n",
    padding="\n\n",
    student_solution_tags=True,
)

# As DeepSeek-R1 and its distilled models write; the teacher's other tags are made to go with it.
R1 = TagSet(
    thought_open="<think>",
    thought_close="</think>",
    solution_open="<solution>",
    solution_close="</solution>",
    explanation_open="<explanation>",
    explanation_close="</explanation>",
    separator="\n\n",
    padding="\n",
    student_solution_tags=False,
)
NAMED = {"stratos": STRATOS, "r1": R1}


def tag_set(prompts: PromptConfig) -> TagSet:
    """The configured tag set."""
    if prompts.custom_tags is not None:
        return TagSet(**prompts.custom_tags.model_dump())
    return NAMED[prompts.tags]


def teacher_system(prompts: PromptConfig) -> str:
    """The configured text unchanged, else the default with the tags filled in; "" means no system prompt."""
    return tag_set(prompts).system(TEACHER_SYSTEM) if prompts.teacher_system is None else prompts.teacher_system


def student_system(prompts: PromptConfig) -> str:
    """The configured text unchanged, else the default with the tags filled in; "" means no system prompt."""
    return tag_set(prompts).system(STUDENT_SYSTEM) if prompts.student_system is None else prompts.student_system
