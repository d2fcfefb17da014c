"""Prefill: runs each distinct prompt once; its KV cache is kept until the last of its completions joined the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.models.decoding import cached_forward, last_token_logits
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.platform import device
from megatron_rlt.rollout.requests import SampleRequest


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts that were prefilled together."""

    cache: KeyValueCache  # one row per prompt
    logits: Tensor | None  # [prompts, V] fp32 after each prompt's last token; last stage only


class Prompts:
    """The distinct prompts of a replica's requests. Collective over the replica; use inside `decoding`."""

    def __init__(
        self, model: LanguageModel, requests: Sequence[SampleRequest], *, max_prefill_tokens: int, max_length: int
    ) -> None:
        """
        Args:
            requests: all requests of later `serve` calls, in any order.
            max_prefill_tokens: prompt tokens per prefill, padding included; a longer prompt is prefilled alone.
            max_length: tokens per row at most, prompt and completion together.
        """
        self.num_tokens = 0  # prefilled so far, without padding
        self._model = model
        self._max_prefill_tokens, self._max_length = max_prefill_tokens, max_length
        self._still_wanted = Counter(_key(request) for request in requests)
        self._held: dict[bytes, tuple[Prefilled, int]] = {}

    def serve(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[Prefilled, list[tuple[int, int]]]]:
        """Yield each prefill with pairs of a request's index in `requests` and its prompt's row in the prefill."""
        prompts = {_key(request): request.token_ids for request in requests}
        held = {key for key in prompts if key in self._held}
        missing = [key for key in prompts if key not in held]
        yield from self._share(requests, held)
        for chunk in _chunks([(key, prompts[key]) for key in missing], self._max_prefill_tokens):
            prefilled = self._prefill([prompt for _, prompt in chunk])
            self._held |= {key: (prefilled, row) for row, (key, _) in enumerate(chunk)}
            yield from self._share(requests, {key for key, _ in chunk})

    def _share(
        self, requests: Sequence[SampleRequest], keys: set[bytes]
    ) -> Iterator[tuple[Prefilled, list[tuple[int, int]]]]:
        """Yield held prompts, and drop those that no later request needs."""
        shares: dict[Prefilled, list[tuple[int, int]]] = {}
        for place, request in enumerate(requests):
            key = _key(request)
            if key in keys:
                prefilled, row = self._held[key]
                shares.setdefault(prefilled, []).append((place, row))
                self._still_wanted[key] -= 1
        for key in keys:
            if not self._still_wanted[key]:
                del self._held[key]
        yield from shares.items()

    def _prefill(self, prompts: Sequence[Tensor]) -> Prefilled:
        counts = torch.tensor([prompt.numel() for prompt in prompts])
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        cache = KeyValueCache(
            num_rows=len(prompts),
            max_rows=len(prompts),
            capacity=padded.size(1),
            max_length=self._max_length,
            device=device(),
        )
        hidden = cached_forward(self._model, cache, padded, counts)
        logits = None if hidden is None else last_token_logits(self._model, hidden, counts)
        self.num_tokens += int(counts.sum())
        return Prefilled(cache, logits)


def _key(request: SampleRequest) -> bytes:
    return request.token_ids.numpy().tobytes()


def _chunks(prompts: list[tuple[bytes, Tensor]], max_tokens: int) -> Iterator[list[tuple[bytes, Tensor]]]:
    """Split prompts into batches of at most `max_tokens` tokens with padding, longest first."""
    prompts = sorted(prompts, key=lambda prompt: -prompt[1].numel())
    start = 0
    while start < len(prompts):
        fitting = max(1, max_tokens // prompts[start][1].numel())
        yield prompts[start : start + fitting]
        start += fitting
