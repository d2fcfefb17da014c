"""Completions that decode together on one replica, whose ranks have equal rows and take equal branches together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.rollout import FIRST_CACHE_SLOTS
from megatron_rlt.models.decoding import cached_forward, last_token_logits
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.platform import device
from megatron_rlt.rollout.megatron.prefill import Prompts
from megatron_rlt.rollout.requests import SampleRequest, StopCondition, require_finite
from megatron_rlt.types import FinishReason

Draw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits `[B, V]`, seeds `[B]` and token indices `[B]` to token ids `[B]` and their log-probs `[B]`."""


@dataclass(eq=False)
class Row:
    """One completion while it grows."""

    index: int  # of its request
    request: SampleRequest
    sampled_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class DecodingBatch:
    """Rows that grow by one token per `step`. Use inside `models.decoding.decoding`."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        *,
        draw: Draw,
        stop: StopCondition,
        max_completion_tokens: int,
        max_rows: int,
        longest_prompt: int,
    ) -> None:
        self.rows: list[Row] = []
        self.num_steps, self.num_decoded_rows = 0, 0
        self._model, self._prompts = model, prompts
        self._draw, self._stop = draw, stop
        self._max_completion_tokens = max_completion_tokens
        self._cache = KeyValueCache(
            num_rows=0,
            max_rows=max_rows,
            capacity=longest_prompt + FIRST_CACHE_SLOTS,
            max_length=longest_prompt + max_completion_tokens,
            device=device(),
        )

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache of all rows."""
        return self._cache.num_bytes

    def admit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        """Add requests (with their indices) to the batch and sample their first tokens."""
        for prefilled, shares in self._prompts.serve([request for _, request in requests]):
            rows = [Row(*requests[place]) for place, _ in shares]
            copies = torch.tensor([prompt for _, prompt in shares])
            logits = prefilled.logits
            self._grow(rows, None if logits is None else logits[copies.to(logits.device)])
            self._cache.extend(prefilled.cache, copies)
            self.rows += rows

    def step(self) -> None:
        """Sample the next token of every row."""
        last = torch.tensor([[row.sampled_ids[-1]] for row in self.rows])
        ones = torch.ones(len(self.rows), dtype=torch.int64)
        hidden = cached_forward(self._model, self._cache, last, ones)
        logits = None if hidden is None else last_token_logits(self._model, hidden, ones)
        self._grow(self.rows, logits)
        self.num_steps += 1
        self.num_decoded_rows += len(self.rows)

    def release(self) -> list[Row]:
        """Drop the finished rows from the batch and return them; the last rows take their places."""
        finished = [row for row in self.rows if row.finish_reason is not None]
        if finished:
            num_kept = len(self.rows) - len(finished)
            movers = (n for n in range(num_kept, len(self.rows)) if self.rows[n].finish_reason is None)
            kept = [n if self.rows[n].finish_reason is None else next(movers) for n in range(num_kept)]
            self.rows = [self.rows[n] for n in kept]
            self._cache.keep(torch.tensor(kept, dtype=torch.int64))
        return finished

    def _grow(self, rows: Sequence[Row], logits: Tensor | None) -> None:
        """Append one token per row, and finish the rows that end with it; raises as `require_finite`."""
        tokens, logprobs = self._next_tokens(rows, logits)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            require_finite([logprob], row.request, first=len(row.sampled_ids))
            row.sampled_ids.append(int(token))
            row.logprobs.append(logprob)
            if self._stop(row.sampled_ids):
                row.finish_reason = FinishReason.STOP
            elif len(row.sampled_ids) == self._max_completion_tokens:
                row.finish_reason = FinishReason.LENGTH

    def _next_tokens(self, rows: Sequence[Row], logits: Tensor | None) -> tuple[list[float], list[float]]:
        """Token ids and log-probs on every rank of the replica.

        The last stage's tensor-parallel ranks draw the same tokens from the same gathered logits; the other stages
        receive them. float64 holds ids and float32 log-probs exactly, so one broadcast carries both.
        """
        drawn = torch.empty(2, len(rows), dtype=torch.float64, device=device())
        if logits is not None:
            seeds = torch.tensor([row.request.seed for row in rows], device=logits.device)
            positions = torch.tensor([len(row.sampled_ids) for row in rows], device=logits.device)
            drawn[0], drawn[1] = self._draw(logits, seeds, positions)
        layout = self._model.layout
        if layout.pp > 1:
            dist.broadcast(drawn, src=layout.last_stage_rank, group=layout.pp_group)
        tokens, logprobs = drawn.tolist()
        return tokens, logprobs
