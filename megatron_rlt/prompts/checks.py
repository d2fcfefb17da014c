"""What must hold before a format is used: the tokenizer can write the tags, and a row imitates no special token."""

from __future__ import annotations

from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.prompts.tokenizer import ChatTokenizer
from megatron_rlt.types import Problem


def check_tags(tokenizer: ChatTokenizer, tags: TagSet) -> None:
    """Raise ValueError if the tokenizer cannot write a tag, or the chat template opens a tag by itself."""
    header = tokenizer.generation_header()
    for tag in tags.texts:
        written = tokenizer.decode(tokenizer.encode(tag))
        if tag not in written:
            raise ValueError(
                f"tokenizer of {tokenizer.folder} writes the tag {tag!r} as {written!r}; choose tags that its"
                " vocabulary can write (prompts.tags, prompts.custom_tags)"
            )
        if tag in header:
            raise ValueError(
                f"chat template of {tokenizer.folder} itself begins the assistant's text with {tag!r}; choose another"
                " tag set (prompts.tags) or remove the tag from the template"
            )


def check_text(tokenizer: ChatTokenizer, problem: Problem) -> None:
    """Raise ValueError if a question would act as template text, or nothing of the solution is left to predict."""
    check_question(tokenizer, problem.problem_id, problem.question)
    if not problem.solution.strip():
        raise ValueError(f"problem {problem.problem_id}: its solution is empty; drop the row")


def check_question(tokenizer: ChatTokenizer, problem_id: str, question: str) -> None:
    """Raise ValueError if a question would act as template text."""
    token = tokenizer.special_token_in(question)
    if token is not None:
        raise ValueError(
            f"problem {problem_id}: its question holds the special token {token!r}, which the chat template"
            " would take for its own; remove it from the row"
        )
