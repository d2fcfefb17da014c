"""Per-token log-probs of given sequences under a model in its own layout, without gradients.

In: the step's sequences, the same on every rank. Out: log-probs or hidden states of their wanted tokens, in the
caller's order, on every rank. Used for the frozen student, the reference, and the policy before its update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from megatron_rlt.config.models import ScoringConfig
from megatron_rlt.models.flops import scoring_flops
from megatron_rlt.models.forward import gather_rows, run_stage, target_logprobs, target_rows
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, pack, partition_by_flops
from megatron_rlt.parallel.collectives import broadcast_record, gather_by_index
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.pipeline import forward_only
from megatron_rlt.types import Logprobs, OnProgress, SpannedSequence, tell_nobody

T = TypeVar("T")


class LogprobEngine:
    """Scores with one model on these ranks, with its weights at the time of the call."""

    def __init__(
        self, model: LanguageModel, *, temperature: float, scoring: ScoringConfig, on_progress: OnProgress = tell_nobody
    ) -> None:
        """Bind the engine to this rank's stage of a model, not wrapped by DistributedDataParallel.

        Args:
            temperature: divides the logits; recorded in every result.
            scoring: token budget of a forward pass, and block sizes of the output layer.
            on_progress: called for every pack.
        """
        self._on_progress = on_progress
        self.model, self.temperature, self._scoring = model, temperature, scoring

    def logprobs(self, sequences: Sequence[SpannedSequence]) -> Logprobs:
        """Log-prob and entropy of every wanted token. Collective: every rank passes the same sequences.

        Returns:
            `[N_i]` float32 of each per sequence, on the CPU; packing changes only the rounding of matrix products.
        """

        def read(batch: PackedBatch, stage_output: Tensor) -> list[tuple[Tensor, Tensor]]:
            logprobs, entropy = target_logprobs(
                self.model,
                stage_output,
                batch,
                temperature=self.temperature,
                row_block=self._scoring.row_block,
                vocab_block=self._scoring.vocab_block,
            )
            return list(zip(_parts(batch, logprobs), _parts(batch, entropy), strict=True))

        results = self._run(sequences, read)
        values, entropy = (tuple(result[kind] for result in results) for kind in (0, 1))
        return Logprobs(values=values, entropy=entropy, temperature=self.temperature)

    def model_flops(self, sequences: Sequence[SpannedSequence]) -> float:
        """What `logprobs` of these sequences costs over all ranks, as `models.flops` counts."""
        return scoring_flops(self.model.architecture, sequences)

    def hidden(self, sequences: Sequence[SpannedSequence]) -> tuple[Tensor, ...]:
        """The final hidden states that predict the wanted tokens: one `[N_i, H]` per sequence, on the CPU.

        In the model's dtype, before the output layer. Collective, as `logprobs`. Every rank receives all of them, so
        pass few sequences at a time.
        """

        def read(batch: PackedBatch, stage_output: Tensor) -> list[Tensor]:
            own = target_rows(stage_output, batch.rows, self.model.layout)
            return _parts(batch, gather_rows(own, batch, self.model.layout))

        return tuple(self._run(sequences, read))

    def _run(self, sequences: Sequence[SpannedSequence], read: Callable[[PackedBatch, Tensor], list[T]]) -> list[T]:
        """`read`'s result for each sequence, from the last stage's output, in the caller's order."""
        layout = self.model.layout
        mine = partition_by_flops(sequences, layout.dp, self.model.architecture)[layout.dp_rank]
        batches = pack(
            sequences,
            mine,
            max_tokens=self._scoring.max_tokens_per_pack,
            max_sequences=None,
            alignment=alignment_of(layout, token_multiple=self.model.token_multiple),
        )
        was_training = self.model.training
        self.model.eval()  # no recomputation: there is no backward pass
        try:
            with self.model.onloaded():
                results = forward_only(
                    self.model,
                    layout,
                    batches,
                    run_stage,
                    lambda index, output: read(batches[index], output),
                    on_batch=lambda index: self._on_progress(f"pack {index + 1} of {len(batches)}"),
                )
        finally:
            self.model.train(was_training)
        results = broadcast_record(results, source_rank=layout.last_stage_rank, group=layout.pp_group)
        by_sequence = {
            index: result
            for batch, batch_results in zip(batches, results, strict=True)
            for index, result in zip(batch.sequence_indices, batch_results, strict=True)
        }
        return gather_by_index(by_sequence, len(sequences), layout.dp_group)


def _parts(batch: PackedBatch, per_row: Tensor) -> list[Tensor]:
    """One CPU tensor per packed sequence. Copies, because pickling a view sends its whole storage."""
    return [part.clone() for part in batch.split(per_row.detach().cpu())]
