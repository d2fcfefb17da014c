"""Texts for property tests: ordinary writing, any unicode, and pieces of tags and special tokens."""

from hypothesis import settings
from hypothesis import strategies as st

from megatron_rlt.prompts.tags import R1, STRATOS
from megatron_rlt.visible_text import is_blank

# No deadline: first examples load tokenizers, and the suite shares two cores.
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>")
FRAGMENTS = ("<|", "|>", "<|end_of_", ".<|end_of_explanation", "</", "\n\n", ".\n\n", " ", "é", "中文", "🙂", "x = 3")
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
any_text = st.lists(
    st.one_of(plain_text, st.sampled_from((*STRATOS.texts, *R1.texts, *SPECIAL, *FRAGMENTS))), max_size=5
).map("".join)
solutions = any_text.filter(lambda text: not is_blank(text))
questions = any_text.filter(lambda text: not any(token in text for token in (*SPECIAL, "<|end")))
