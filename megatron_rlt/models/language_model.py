"""Megatron's GPT that ends at the hidden states: logits are made elsewhere, from the rows that need them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.residency import HostWeights


class LanguageModel(GPTModel):  # type: ignore[misc]
    """One pipeline stage of a dense decoder. Build with `build_model`, fill with `models.weights`."""

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any) -> None:  # noqa: ANN401 - GPTModel's
        super().__init__(*args, **kwargs)
        self.architecture = architecture
        self.unpadded_vocab_size = architecture.vocab_size  # `vocab_size` is Megatron's: padded to a multiple of tp
        self._host_weights: HostWeights | None = None

    def live_on_host(self) -> None:
        """Hand the device's memory back and hold it from now on only in turns: `on_device`. For frozen models."""
        self._host_weights = HostWeights(self)

    def on_device(self, *, changes: bool = False) -> AbstractContextManager[None]:
        """A turn: the weights are on the device for its time. Nothing moves for a model that stays there.

        Args:
            changes: the weights are written in this turn; without it, what is written may be lost.
        """
        return nullcontext() if self._host_weights is None else self._host_weights.turn(changes=changes)

    @property
    def weight_bytes(self) -> int:
        """Of this rank's weights on the device in any case."""
        if self._host_weights is not None:
            return 0
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def host_weight_bytes(self) -> int:
        """Of this rank's weights that live on the host."""
        return 0 if self._host_weights is None else self._host_weights.num_bytes

    def take_visiting_bytes(self) -> int:
        """Of weights that live on the host and had a turn since the last call."""
        return 0 if self._host_weights is None else self._host_weights.take_visiting_bytes()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: KeyValueCache | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: `[B, T]` int64; later stages take their input from `set_input_tensor`.
            position_ids: `[B, T]` int64.
            attention_mask: None: causal; with an `inference_context` its mask.

        Returns:
            `[T, B, H]`, with sequence parallelism this rank's `T / tp`: on the last stage the hidden states after the
            final norm, on the others the next stage's input.
        """
        hidden: Tensor = super().forward(
            input_ids,
            position_ids,
            attention_mask,
            packed_seq_params=packed_seq_params,
            inference_context=inference_context,
        )
        return hidden

    def output_weight(self) -> Tensor:
        """`[V_padded / tp, H]`: this rank's rows of the output layer, tied or not. Last stage only."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states
