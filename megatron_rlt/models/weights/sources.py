"""Reads a model's tensors under Hugging Face names from a folder of any kind, one tensor of Megatron's at a time.

`open_weights` checks names, shapes and dtypes of the whole folder before any value is read. No GPU, no process group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.description import ModelDescription
from megatron_rlt.config.folders.kind import Kind
from megatron_rlt.config.folders.optimizer_state import STATE_PREFIX, OptimizerState
from megatron_rlt.config.folders.tensors import ChunkedTensor, TensorFolder
from megatron_rlt.models.weights.chunk_reader import read_tensor
from megatron_rlt.models.weights.hf_reader import StoredTensor, check_census, read_headers
from megatron_rlt.models.weights.table import Rule, Split, WeightPair, hf_shapes, hf_views, weight_pairs

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_MEGATRON_OUTPUT = "output_layer.weight"
_LAYERS = "decoder.layers."
_OTHER_STATE = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler")  # of training, beside the weights
_HALVES = ("_w", "_v")  # gate and up rows, where Megatron stores them apart (singleton_local_shards)
_HF_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class WeightSource(ABC):
    """The weights of one folder."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    @property
    @abstractmethod
    def stored_names(self) -> Mapping[str, str]:
        """The name that every Hugging Face tensor, or what holds it, has in the folder."""

    @abstractmethod
    def parts(self, pair: WeightPair) -> dict[str, Tensor]:
        """The Hugging Face tensors of one tensor of Megatron's, whole, on the CPU, in their stored dtype."""

    def tensors(self, *, workers: int = 1) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor once, in the table's order; `workers` threads read ahead, each a tensor."""
        pairs = own_pairs(self.architecture)
        if workers == 1:
            for pair in pairs:
                yield from self.parts(pair).items()
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead = deque(pool.submit(self.parts, pair) for pair in islice(pairs, workers))
            while ahead:
                parts = ahead.popleft().result()
                ahead.extend(pool.submit(self.parts, pair) for pair in islice(pairs, 1))
                yield from parts.items()


def own_pairs(architecture: Architecture) -> Iterator[WeightPair]:
    """The table without the copy of a tied embedding."""
    seen: set[str] = set()
    for pair in weight_pairs(architecture):
        if not seen.issuperset(pair.hf_shapes):
            seen.update(pair.hf_shapes)
            yield pair


def split_pair(pair: WeightPair, whole: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """The Hugging Face tensors in a whole tensor of Megatron's; vocabulary padding is cut off."""
    views = hf_views(pair, whole, architecture)
    return {
        name: view.flatten(0, view.dim() - len(shape))[: shape[0]].contiguous()
        for (name, shape), view in zip(pair.hf_shapes.items(), views, strict=True)
    }


def join_pair(pair: WeightPair, parts: Mapping[str, Tensor], architecture: Architecture) -> Tensor:
    """The whole tensor of Megatron's that holds these Hugging Face tensors."""
    if pair.rule is Rule.PLAIN:
        return next(iter(parts.values()))
    whole = torch.empty(megatron_shape(pair), dtype=next(iter(parts.values())).dtype)
    for name, view in zip(pair.hf_shapes, hf_views(pair, whole, architecture), strict=True):
        view.copy_(parts[name].reshape(view.shape))
    return whole


def megatron_shape(pair: WeightPair) -> tuple[int, ...]:
    """Shape of Megatron's whole tensor: the rows of all its Hugging Face tensors."""
    shapes = list(pair.hf_shapes.values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def open_weights(described: ModelDescription) -> WeightSource:
    """Open a folder's weights.

    Raises:
        ValueError: tensors are missing, surplus, of another shape or dtype than the architecture says; all at once.
    """
    if described.tensors is None:
        return _HuggingFaceWeights(described.found.weights, described.architecture)
    if described.found.kind is Kind.FSDP:
        return _NamedChunks(described)
    return _MegatronChunks(described)


def open_optimizer(described: ModelDescription, state: OptimizerState) -> dict[str, WeightSource]:
    """Open Adam's state: tensors under the weights' names, per kind of state. Raises ValueError as `open_weights`."""
    sources: dict[str, WeightSource] = {}
    for name in state.states:
        prefix = f"{STATE_PREFIX}{name}."
        own = {key.removeprefix(prefix): one for key, one in state.tensors.tensors.items() if key.startswith(prefix)}
        found = replace(described.found, weights=state.tensors.folder)
        view = replace(described, found=found, tensors=TensorFolder(state.tensors.folder, own, ()))
        try:
            sources[name] = _MegatronChunks(view)
        except ValueError as fault:
            raise ValueError(f"optimizer state {name!r}: {fault}") from fault
    return sources


class _HuggingFaceWeights(WeightSource):
    def __init__(self, folder: Path, architecture: Architecture) -> None:
        super().__init__(architecture)
        self._stored = read_headers(folder)
        unused = (_OUTPUT,) if architecture.tied_embeddings else ()
        check_census(folder, self._stored, hf_shapes(architecture), unused=unused)
        if unused and _OUTPUT in self._stored:
            _check_tied(folder, self._read(_EMBEDDING), self._read(_OUTPUT))

    @property
    def stored_names(self) -> dict[str, str]:
        return {name: name for name in hf_shapes(self.architecture)}

    def parts(self, pair: WeightPair) -> dict[str, Tensor]:
        return {name: self._read(name) for name in pair.hf_shapes}

    def _read(self, name: str) -> Tensor:
        with safe_open(self._stored[name].file, framework="pt") as tensors:
            # A copy: what safetensors returns keeps its file mapped, and pages of it in memory.
            return tensors.get_tensor(name).clone()  # type: ignore[no-any-return]


class _NamedChunks(WeightSource):
    """`.distcp` files under Hugging Face names, behind a prefix."""

    def __init__(self, described: ModelDescription) -> None:
        super().__init__(described.architecture)
        assert described.tensors is not None, "it has chunks"
        folder, prefix = described.found.weights, described.prefix
        own = {name for name in described.tensors.tensors if name.startswith(prefix)}
        self._stored = {name.removeprefix(prefix): described.tensors.tensors[name] for name in own if _is_weight(name)}
        self._prefix = prefix
        unused = (_OUTPUT,) if self.architecture.tied_embeddings else ()
        check_census(folder, _headers(folder, self._stored), hf_shapes(self.architecture), unused=unused)
        if unused and _OUTPUT in self._stored:
            _check_tied(folder, read_tensor(self._stored[_EMBEDDING]), read_tensor(self._stored[_OUTPUT]))

    @property
    def stored_names(self) -> dict[str, str]:
        return {name: self._prefix + name for name in hf_shapes(self.architecture)}

    def parts(self, pair: WeightPair) -> dict[str, Tensor]:
        return {name: read_tensor(self._stored[name]) for name in pair.hf_shapes}


@dataclass(frozen=True)
class _Place:
    """Where one tensor of Megatron's is stored: one name or two halves, each perhaps a layer of a stack."""

    names: tuple[str, ...]
    layer: int | None


class _MegatronChunks(WeightSource):
    """`.distcp` files under Megatron's names: Megatron-LM, NeMo, Megatron-Bridge and this program's checkpoints."""

    def __init__(self, described: ModelDescription) -> None:
        super().__init__(described.architecture)
        assert described.tensors is not None, "it has chunks"
        self._stored = dict(described.tensors.tensors)
        self._prefix, self._folder = described.prefix, described.found.weights
        self._places: dict[str, _Place] = {}  # by the first Hugging Face name: a tied embedding has one place
        expected: dict[str, tuple[int, ...]] = {}
        for pair in own_pairs(self.architecture):
            place = self._places[_first(pair)] = self._place(pair)
            expected |= dict.fromkeys(place.names, self._shape(pair, place))
        unused = [name for name in self._stored if not _is_weight(name)]
        if self.architecture.tied_embeddings:
            unused.append(self._prefix + _MEGATRON_OUTPUT)
        headers = _headers(self._folder, self._stored)
        check_census(self._folder, headers, expected, unused=unused, description="its configuration")
        self._check_output()

    @property
    def stored_names(self) -> dict[str, str]:
        return {
            name: " + ".join(self._places[_first(pair)].names) + ("" if pair.layer is None else f"[{pair.layer}]")
            for pair in own_pairs(self.architecture)
            for name in pair.hf_shapes
        }

    def parts(self, pair: WeightPair) -> dict[str, Tensor]:
        place = self._places[_first(pair)]
        halves = [read_tensor(self._stored[name], layer=place.layer) for name in place.names]
        return split_pair(pair, halves[0] if len(halves) == 1 else torch.cat(halves), self.architecture)

    def _place(self, pair: WeightPair) -> _Place:
        """Transformer Engine's names come first; a stack of all layers before one tensor per layer."""
        for name in reversed(pair.megatron_names):
            stacked = name if pair.layer is None else _LAYERS + name.removeprefix(_LAYERS).partition(".")[2]
            for stored, layer in ((stacked, pair.layer), (name, None)):
                key = self._prefix + stored
                if key in self._stored:
                    return _Place((key,), layer)
                if pair.rule is Rule.GATED_MLP and all(key + half in self._stored for half in _HALVES):
                    return _Place(tuple(key + half for half in _HALVES), layer)
        stacked = pair.megatron_names[-1]
        if pair.layer is not None:
            stacked = _LAYERS + stacked.removeprefix(_LAYERS).partition(".")[2]
        return _Place((self._prefix + stacked,), pair.layer)  # missing: the census says so

    def _shape(self, pair: WeightPair, place: _Place) -> tuple[int, ...]:
        rows, *rest = megatron_shape(pair)
        stored = self._stored.get(place.names[0])
        if pair.split is Split.VOCABULARY and stored is not None:
            rows = max(rows, stored.shape[0])  # Megatron pads the vocabulary to a multiple of tp
        stack = () if place.layer is None else (self.architecture.num_layers,)
        return (*stack, rows // len(place.names), *rest)

    def _check_output(self) -> None:
        output = self._stored.get(self._prefix + _MEGATRON_OUTPUT)
        if output is None or not self.architecture.tied_embeddings:
            return
        embedding = self._places[_EMBEDDING].names[0]
        _check_tied(self._folder, read_tensor(self._stored[embedding]), read_tensor(output))


def _first(pair: WeightPair) -> str:
    return next(iter(pair.hf_shapes))


def _is_weight(name: str) -> bool:
    return not name.startswith(_OTHER_STATE)


def _headers(folder: Path, stored: Mapping[str, ChunkedTensor]) -> dict[str, StoredTensor]:
    """As safetensors' headers, for the one census."""
    return {
        name: StoredTensor(folder, tensor.shape, _HF_DTYPES.get(tensor.dtype, tensor.dtype))
        for name, tensor in stored.items()
    }


def _check_tied(folder: Path, embedding: Tensor, output: Tensor) -> None:
    """Refuse an output layer that differs from its tied embedding: one of both would be lost."""
    if not torch.equal(embedding, output):
        raise ValueError(
            f"{folder}: the output layer is tied to the embedding, but both are stored and differ; set"
            " tie_word_embeddings to false in the model's config.json, or remove the output layer from the weights"
        )
