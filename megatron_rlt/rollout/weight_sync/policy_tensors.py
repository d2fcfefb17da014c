"""The policy's weights in the form that sampling engines load: whole tensors under Hugging Face names, one by one.

The names come from the table that import and export use. Iterating is collective over all ranks; the engine reads each
tensor as it is gathered, so no second copy of the model exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rlt.models.checksum import checksum
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.export import Destination, export_tensors

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SEEN_WHOLE = "norm.weight"  # ends the names of weights that no engine splits, joins or packs


class PolicyTensors:
    """Iterates over all weights; each iteration gathers them again and records their size and checksums."""

    def __init__(self, model: LanguageModel) -> None:
        """`model`: this rank's stage of the policy, not wrapped by DistributedDataParallel."""
        self._model = model
        self.num_bytes = 0
        """Size of all weights, from the last iteration."""
        self.checksums: dict[str, str] = {}
        """By name, checksums of the weights that an engine holds in the form in which they are sent: the norms."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.num_bytes = 0
        for name, tensor in export_tensors(self._model, destination=Destination.ALL_RANKS):
            self.num_bytes += tensor.nbytes
            if name.endswith(_SEEN_WHOLE):
                self.checksums[name] = checksum(tensor)
            yield name, tensor
            if name == _EMBEDDING and self._model.architecture.tied_embeddings and not torch.cuda.is_available():
                # vLLM's CPU build packs the output layer apart from the embedding, and would keep the old one.
                yield _OUTPUT, tensor.clone()  # safetensors refuses two names for one storage
