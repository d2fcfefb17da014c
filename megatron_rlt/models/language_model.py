"""Megatron's GPT without the output layer's product: logits are computed elsewhere, for the wanted rows only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.fp8 import held_tensors
from megatron_rlt.models.offload import OffloadedWeights
from megatron_rlt.parallel.layout import Layout


class LanguageModel(GPTModel):  # type: ignore[misc]
    """One pipeline stage of a dense decoder. Build with `build_model`, fill with `models.weights`.

    A call with input and position ids `[B, T]` returns `[T, B, H]`, with sequence parallelism this rank's `T / tp`: the
    last stage's hidden states after the final norm, or the next stage's input. Later stages read `set_input_tensor`.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - GPTModel's
        architecture: Architecture,
        layout: Layout,
        fp8: Fp8Config | None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self.architecture, self.layout = architecture, layout
        self.token_multiple = 1 if fp8 is None else fp8.token_multiple  # of the tokens of a pack on one rank
        self.unpadded_vocab_size = architecture.vocab_size  # `vocab_size` is Megatron's: padded to a multiple of tp
        self._offloaded: OffloadedWeights | None = None

    def offload(self) -> None:
        """Move a frozen model's weights to host memory; they are on the device only inside `with model.onloaded():`."""
        self._offloaded = OffloadedWeights(self)

    def onloaded(self, *, changes: bool = False) -> AbstractContextManager[None]:
        """Hold the weights on the device inside this context; does nothing for a model that is not offloaded.

        Writes to the weights are kept only with `changes`.
        """
        return nullcontext() if self._offloaded is None else self._offloaded.onload(changes=changes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's weights that are on the device all the time."""
        if self._offloaded is not None:
            return 0
        return sum(tensor.nbytes for tensor in held_tensors(self))

    @property
    def host_weight_bytes(self) -> int:
        """Bytes of this rank's offloaded weights."""
        return 0 if self._offloaded is None else self._offloaded.num_bytes

    def take_onloaded_bytes(self) -> int:
        """Bytes of offloaded weights that were on the device since the last call; resets the counter."""
        return 0 if self._offloaded is None else self._offloaded.take_onloaded_bytes()

    def output_weight(self) -> Tensor:
        """`[V_padded / tp, H]`: this rank's rows of the output layer, tied or not. Last stage only."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()  # type: ignore[no-any-return]
        return self.output_layer.weight  # type: ignore[no-any-return]

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states
