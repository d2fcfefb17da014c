"""Exact KL(teacher || student) over the vocabulary for every explanation token, between models in different layouts.

In: scoring pairs, the same on every rank. Out: one `[E]` tensor a pair, on every rank. Each model computes its hidden
states in its own layout; every rank of the job then takes a share of the rows, and the output weights come to it in
blocks. The sums over the vocabulary belong to `parallel.vocab_divergence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device
from megatron_rlt.parallel.vocab_divergence import (
    WeightBlocks,
    broadcast_weight_blocks,
    pair_weight_blocks,
    vocab_divergence,
)
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import ScoringPair, Span, SpannedSequence


class DivergenceEngine:
    """Compares the teacher's and the student's next-token distributions, with their weights at the call."""

    def __init__(
        self,
        teacher: LogprobEngine,
        student: LogprobEngine,
        *,
        max_rows_per_rank: int,
        row_block: int,
        vocab_block: int,
    ) -> None:
        """Bind two engines. Collective: every rank constructs it.

        Args:
            max_rows_per_rank: explanation tokens a rank compares between two walks through both output weights.
                Every rank also holds, for that time and on the host, both models' hidden states for the share of all
                ranks.
            row_block, vocab_block: at most `row_block x vocab_block` logits of each model exist at one time.

        Raises:
            ValueError: the engines' temperatures differ.
        """
        if teacher.temperature != student.temperature:
            raise ValueError(
                "a divergence compares distributions at one temperature; got "
                f"{teacher.temperature} for the teacher and {student.temperature} for the student: set both alike"
            )
        self._teacher, self._student = teacher, student
        self._teacher_owners, self._student_owners = _owners(teacher.layout), _owners(student.layout)
        self._max_rows = max_rows_per_rank * dist.get_world_size()
        self._row_block, self._vocab_block = row_block, vocab_block

    def per_token(self, pairs: Sequence[ScoringPair]) -> tuple[Tensor, ...]:
        """The divergence at every explanation token, `[E]` float32 nats a pair, on the CPU of every rank. Collective.

        Where the vocabularies' sizes differ, both distributions are those over the common ids.
        """
        with self._teacher.model.on_device(), self._student.model.on_device():
            return tuple(part for chunk in _chunks(pairs, self._max_rows) for part in self._chunk(chunk))

    def model_flops(self, pairs: Sequence[ScoringPair]) -> float:
        """What `per_token` costs over all ranks, as `models.flops` counts: both models up to the explanation's end."""
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
        lengths = [pair.num_explanation_tokens for pair in pairs]
        shares: list[Tensor] = [divergence.cpu()] * world_size
        dist.all_gather_object(shares, divergence.cpu())
        return [part.clone() for part in torch.split(torch.cat(shares), lengths)]

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
        shard_rows=model.vocab_size // engine.layout.tp,  # Megatron's vocab_size, padded to a multiple of tp
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
    """Consecutive pairs of at most `max_rows` explanation tokens; a longer explanation is a chunk of its own."""
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
    """The sequence up to the end of `span`, asking for its tokens: what follows cannot change them."""
    return SpannedSequence(sequence.token_ids[: span.stop], (span,))
