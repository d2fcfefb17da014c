"""Exact KL(teacher || student) over the vocabulary for every explanation token, between models in different layouts.

In: scoring pairs, the same on every rank. Out: one `[E]` tensor per pair, on every rank. Each model computes its hidden
states in its own layout; `parallel.vocab_divergence` then sums over the vocabulary for each rank's share of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.models import ScoringConfig
from megatron_rlt.parallel.collectives import gather_by_index
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device, world
from megatron_rlt.parallel.vocab_divergence import (
    WeightBlocks,
    broadcast_weight_blocks,
    pair_weight_blocks,
    vocab_divergence,
)
from megatron_rlt.parallel.vocab_logprobs import block_sizes
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import ScoringPair, Span, SpannedSequence


class DivergenceEngine:
    """Compares the next-token distributions of teacher and student, with their weights at the time of the call."""

    def __init__(self, teacher: LogprobEngine, student: LogprobEngine, scoring: ScoringConfig) -> None:
        """Bind two engines. Collective on all ranks.

        Args:
            scoring: each pass over both output weights compares `max_tokens_per_pack` explanation tokens per rank;
                meanwhile every rank holds both models' hidden states for all ranks' tokens in host memory; at most
                `row_block x vocab_block` logits per model exist at one time.

        Raises:
            ValueError: the engines' temperatures differ.
        """
        if teacher.temperature != student.temperature:
            raise ValueError(
                "a divergence compares distributions at one temperature; got "
                f"{teacher.temperature} for the teacher and {student.temperature} for the student: set both alike"
            )
        self._teacher, self._student = teacher, student
        self._teacher_owners, self._student_owners = _owners(teacher.model.layout), _owners(student.model.layout)
        self._max_rows = scoring.max_tokens_per_pack * dist.get_world_size()
        self._row_block, self._vocab_block = block_sizes(device(), scoring.row_block, scoring.vocab_block)

    def per_token(self, pairs: Sequence[ScoringPair]) -> tuple[Tensor, ...]:
        """KL at every explanation token, `[E]` float32 nats per pair, on the CPU of every rank. Collective.

        If the vocabularies' sizes differ, both distributions are over the common ids.
        """
        with self._teacher.model.onloaded(), self._student.model.onloaded():
            return tuple(part for chunk in _chunks(pairs, self._max_rows) for part in self._chunk(chunk))

    def model_flops(self, pairs: Sequence[ScoringPair]) -> float:
        """Model FLOP of `per_token` over all ranks: both models up to the end of the explanation."""
        teacher = self._teacher.model_flops([_explanation_of_teacher(pair) for pair in pairs])
        return teacher + self._student.model_flops([_explanation_of_student(pair) for pair in pairs])

    def _chunk(self, pairs: Sequence[ScoringPair]) -> list[Tensor]:
        teacher_rows = torch.cat(self._teacher.hidden([_explanation_of_teacher(pair) for pair in pairs]))
        student_rows = torch.cat(self._student.hidden([_explanation_of_student(pair) for pair in pairs]))
        rank, world_size, num_rows = dist.get_rank(), dist.get_world_size(), len(teacher_rows)
        mine = slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
        divergence = vocab_divergence(
            teacher_rows[mine].to(device()),
            student_rows[mine].to(device()),
            self._weight_blocks(),
            temperature=self._teacher.temperature,
            row_block=self._row_block,
        )
        by_rank = gather_by_index({rank: divergence.cpu()}, world_size, world())
        lengths = [pair.num_explanation_tokens for pair in pairs]
        return [part.clone() for part in torch.split(torch.cat(by_rank), lengths)]

    def _weight_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        vocab_size = min(self._teacher.model.unpadded_vocab_size, self._student.model.unpadded_vocab_size)
        return pair_weight_blocks(
            _blocks(self._teacher, self._teacher_owners, vocab_size, self._vocab_block),
            _blocks(self._student, self._student_owners, vocab_size, self._vocab_block),
        )


def _blocks(engine: LogprobEngine, owners: Sequence[int], vocab_size: int, block: int) -> WeightBlocks:
    model = engine.model
    return broadcast_weight_blocks(
        model.output_weight().detach() if dist.get_rank() in owners else None,
        vocab_size=vocab_size,
        owners=owners,
        shard_rows=model.vocab_size // model.layout.tp,  # Megatron's vocab_size, padded to a multiple of tp
        hidden_size=model.config.hidden_size,
        dtype=model.config.params_dtype,
        device=device(),
        block=block,
        group=None,
    )


def _owners(layout: Layout) -> tuple[int, ...]:
    """Global ranks that hold the output weight of the first replica, in vocabulary order. Collective over all ranks."""
    places: list[tuple[bool, int]] = [(False, 0)] * dist.get_world_size()
    dist.all_gather_object(places, (layout.dp_cp_rank == 0 and layout.is_last_stage, layout.tp_rank))
    ranks = [rank for rank, (owns, _) in enumerate(places) if owns]
    return tuple(sorted(ranks, key=lambda rank: places[rank][1]))


def _chunks(pairs: Sequence[ScoringPair], max_rows: int) -> Iterator[list[ScoringPair]]:
    """Split into consecutive pairs with at most `max_rows` explanation tokens; a longer explanation stands alone."""
    chunk: list[ScoringPair] = []
    num_rows = 0
    for pair in pairs:
        if chunk and num_rows + pair.num_explanation_tokens > max_rows:
            yield chunk
            chunk, num_rows = [], 0
        chunk.append(pair)
        num_rows += pair.num_explanation_tokens
    if chunk:
        yield chunk


def _explanation_of_teacher(pair: ScoringPair) -> SpannedSequence:
    start = pair.teacher.spans[0].start
    return _cut(pair.teacher, Span(start, start + pair.num_explanation_tokens))


def _explanation_of_student(pair: ScoringPair) -> SpannedSequence:
    return _cut(pair.student, pair.explanation_span)


def _cut(sequence: SpannedSequence, span: Span) -> SpannedSequence:
    """The sequence up to the end of `span`, whose tokens are wanted; later tokens cannot change them."""
    return SpannedSequence(sequence.token_ids[: span.stop], (span,))
