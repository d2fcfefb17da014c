"""A student whose tokenizer is not the teacher's, and its r_SS by plain transformers, from the texts alone.

The oracle shares no code with the package: the chat template, every piece and every tag are written and encoded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlt.types import Span, SpannedSequence
from tests.jobs.tiny_scores import flatten_distributions
from tests.oracle import dense_logprobs
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import OTHER_SENTENCES, tiny_tokenizer

VOCAB_SIZE = 403  # not the teacher's size, and not even


def foreign_student(folder: Path) -> Path:
    """A Llama with a Llama-like tokenizer of its own: other merges, other special tokens, another chat template."""
    model = tiny_hf_model(
        folder, "llama", tied=False, seed=2, num_layers=2, hidden_size=32, ffn_size=64, head_dim=8, num_kv_heads=4,
        vocab_size=VOCAB_SIZE, max_positions=700,
    )  # fmt: skip
    flatten_distributions(model / "model.safetensors")
    return tiny_tokenizer(model, "llama", OTHER_SENTENCES)


class TextOracle:
    """What a student makes of texts between the tags `opening`, `bridge` and `closing`, without a system prompt.

    What follows the opening is encoded as one text; a piece has the tokens that lie wholly within it.
    """

    def __init__(self, folder: Path, *, opening: str, bridge: str, closing: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._opening, self._bridge, self._closing = opening, bridge, closing

    def solution_logprobs(self, question: str, explanation: str, solution: str, *, temperature: float) -> torch.Tensor:
        """`[S]` float64 after the explanation."""
        header = f"<|start_header_id|>user<|end_header_id|>\n\n{question.strip()}<|eot_id|>"
        header = f"<|begin_of_text|>{header}<|start_header_id|>assistant<|end_header_id|>\n\n"
        prompt = [*self._tokenizer.encode(header, add_special_tokens=False), *self._encode(self._opening)]
        before = f"{explanation}{self._bridge}"
        ids = self._encode(f"{before}{solution}{self._closing}")
        # The first token that begins at the solution or later, and the one after the last that ends with it.
        start = next(n for n in range(len(ids)) if len(self._decode(ids[:n])) >= len(before))
        stop = max(n for n in range(len(ids) + 1) if len(self._decode(ids[:n])) <= len(before) + len(solution))
        span = Span(len(prompt) + start, len(prompt) + stop)
        return dense_logprobs(self._model, SpannedSequence(torch.tensor([*prompt, *ids]), (span,)), temperature)

    def num_explanation_tokens(self, explanation: str, solution: str) -> int:
        """Tokens of an explanation within the whole text."""
        ids = self._encode(f"{explanation}{self._bridge}{solution}{self._closing}")
        return max(n for n in range(len(ids) + 1) if len(self._decode(ids[:n])) <= len(explanation))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
