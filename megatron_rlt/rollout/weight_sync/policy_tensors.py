"""The policy's weights as a sampling engine wants them: whole tensors under Hugging Face names, one after another.

The names come from the table that import and export use. Collective over all ranks; the engine reads the stream while
it is made, so no second copy of the model exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rlt.models.checksum import checksum
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights import Destination, export_tensors
from megatron_rlt.parallel.layout import Layout

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


_SEEN_WHOLE = "norm.weight"  # ends the names of weights that no engine splits, joins or packs


class PolicyTensors:
    """A passage of all weights: iterate, then ask what went by. Iterated again, it is made again."""

    def __init__(self, model: LanguageModel, layout: Layout) -> None:
        """
        Args:
            model: this rank's stage of the policy, not wrapped by DistributedDataParallel.
        """
        self._model, self._layout = model, layout
        self.num_bytes = 0
        """Of the last passage."""
        self.checksums: dict[str, str] = {}
        """Of the weights that an engine holds as they are: the norms, by name."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.num_bytes = 0
        architecture = self._model.architecture
        exported = export_tensors(self._model, architecture, self._layout, destination=Destination.ALL_RANKS)
        for name, tensor in exported:
            self.num_bytes += tensor.nbytes
            if name.endswith(_SEEN_WHOLE):
                self.checksums[name] = checksum(tensor)
            yield name, tensor
            if name == _EMBEDDING and architecture.tied_embeddings and not torch.cuda.is_available():
                # vLLM's CPU build packs the output layer apart from the embedding, and keeps the old one otherwise.
                yield _OUTPUT, tensor.clone()  # files do not take two names for one memory
