"""Per-token log-probs of given sequences under a model in its own layout, without gradients.

In: the step's sequences, the same on every rank. Out: the log-probs (or hidden states) of their wanted tokens, in the
caller's order, on every rank. Serves the frozen student and the reference, and the policy before its update. Packing,
the model and the output layer belong to `models` and `parallel`; what a log-prob means for a reward, to `rewards`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from megatron_rlt.models.flops import scoring_flops
from megatron_rlt.models.forward import gather_rows, run_stage, target_logprobs, target_rows
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, pack, share
from megatron_rlt.parallel.collectives import broadcast_record, gather_by_index
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.pipeline import forward_only
from megatron_rlt.types import Logprobs, OnProgress, PackedBatch, SpannedSequence, tell_nobody

T = TypeVar("T")


class LogprobEngine:
    """Asks one model that lives on these ranks, with whatever weights it has at the call."""

    def __init__(
        self,
        model: LanguageModel,
        layout: Layout,
        *,
        temperature: float,
        max_tokens_per_pack: int,
        row_block: int,
        vocab_block: int,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """Bind the engine to this rank's stage of a model, not wrapped by DistributedDataParallel.

        Args:
            temperature: divides the logits; recorded in every result.
            max_tokens_per_pack: token budget of one forward pass; a longer sequence is a pack of its own.
            row_block, vocab_block: at most `row_block x vocab_block` logits exist at one time.
            on_progress: told of every pack.
        """
        self._on_progress = on_progress
        self.model, self.layout, self.temperature = model, layout, temperature
        self._max_tokens_per_pack = max_tokens_per_pack
        self._row_block, self._vocab_block = row_block, vocab_block

    def logprobs(self, sequences: Sequence[SpannedSequence]) -> Logprobs:
        """Log-prob and entropy of every wanted token. Collective: every rank passes the same sequences.

        Returns:
            One `[N_i]` float32 of each kind per sequence, on the CPU; they do not depend on the packing beyond the
            rounding of matrix products.
        """

        def read(batch: PackedBatch, stage_output: Tensor) -> list[tuple[Tensor, Tensor]]:
            logprobs, entropy = target_logprobs(
                self.model,
                stage_output,
                batch,
                self.layout,
                temperature=self.temperature,
                row_block=self._row_block,
                vocab_block=self._vocab_block,
            )
            return list(zip(_parts(batch, logprobs), _parts(batch, entropy), strict=True))

        results = self._run(sequences, read)
        return Logprobs(
            values=tuple(logprobs for logprobs, _ in results),
            entropy=tuple(entropy for _, entropy in results),
            temperature=self.temperature,
        )

    def model_flops(self, sequences: Sequence[SpannedSequence]) -> float:
        """What `logprobs` of these sequences costs over all ranks, as `models.flops` counts."""
        return scoring_flops(self.model.architecture, sequences)

    def hidden(self, sequences: Sequence[SpannedSequence]) -> tuple[Tensor, ...]:
        """The final hidden states that predict the wanted tokens: one `[N_i, H]` per sequence, on the CPU.

        In the model's dtype; `model.output_weight()` turns them into logits. Collective, as `logprobs`. Every rank
        receives all of them: ask for few sequences at a time.
        """

        def read(batch: PackedBatch, stage_output: Tensor) -> list[Tensor]:
            own = target_rows(stage_output, batch.rows, self.layout)
            return _parts(batch, gather_rows(own, batch, self.layout))

        return tuple(self._run(sequences, read))

    def _run(self, sequences: Sequence[SpannedSequence], read: Callable[[PackedBatch, Tensor], list[T]]) -> list[T]:
        """What `read` makes of each sequence of a batch from the last stage's output, in the caller's order."""
        mine = share(sequences, self.layout.dp, self.model.architecture)[self.layout.dp_rank]
        batches = pack(
            sequences,
            mine,
            max_tokens=self._max_tokens_per_pack,
            max_sequences=None,
            alignment=alignment_of(self.layout),
        )
        was_training = self.model.training
        self.model.eval()  # no recomputation: there is no backward pass
        try:
            with self.model.on_device():
                results = forward_only(
                    self.model,
                    self.layout,
                    batches,
                    run_stage,
                    lambda index, output: read(batches[index], output),
                    on_batch=lambda index: self._on_progress(f"pack {index + 1} of {len(batches)}"),
                )
        finally:
            self.model.train(was_training)
        results = broadcast_record(results, source_rank=self.layout.last_stage_rank, group=self.layout.pp_group)
        by_sequence = {
            index: result
            for batch, batch_results in zip(batches, results, strict=True)
            for index, result in zip(batch.sequence_indices, batch_results, strict=True)
        }
        return gather_by_index(by_sequence, len(sequences), self.layout.dp_group)


def _parts(batch: PackedBatch, per_row: Tensor) -> list[Tensor]:
    """One CPU tensor a packed sequence. Copies: pickling a view sends all the storage behind it."""
    return [part.clone() for part in batch.split(per_row.detach().cpu())]
