"""FP8 weights of a frozen model: the section, its rules, and the bytes it saves.

What each recipe does to numbers is in `models/quantise.py`, what Transformer Engine is told in `models/fp8.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.section import NonNegativeInt, Section

Recipe = Literal["blockwise", "tensorwise", "mxfp8"]
Linear = Literal["qkv", "proj", "fc1", "fc2"]
Scales = Literal["float32", "power_of_two"]

# Sizes along which a scale is shared: tensor parallelism must not split such a block, and tokens are padded to it.
BLOCK = {"blockwise": 128, "tensorwise": 16, "mxfp8": 32}
# Features that the matrix products of each recipe need a multiple of.
_FEATURES = {"blockwise": 16, "tensorwise": 16, "mxfp8": 32}


class Fp8Config(Section):
    """FP8 (E4M3) weights and products of the four linear layers of a frozen model. Embedding, output layer, norms and
    attention stay bfloat16."""

    recipe: Recipe = "blockwise"
    """Values that share a scale: blockwise 1 x 128 of the input and 128 x 128 of a weight (Hopper, CUDA 12.9),
    tensorwise a whole tensor (Ada or later; scores then depend on the pack), mxfp8 32 in a row (Blackwell)."""
    scales: Scales = "float32"
    """Scales of recipe blockwise: float32, or power_of_two, which is less accurate and which Blackwell needs. One
    process has one of the two."""
    activations: bool = True
    """Quantise the inputs too and multiply in FP8. False: FP8 is storage only, products are bfloat16; the same memory,
    less rounding, no speed."""
    bf16_layers_at_ends: NonNegativeInt = 0
    """First and last layers that stay bfloat16, this many at each end."""
    bf16_linears: tuple[Linear, ...] = ()
    """Linear layers of every layer that stay bfloat16: qkv, proj, fc1, fc2."""

    @property
    def token_multiple(self) -> int:
        """What must divide the tokens that reach a linear layer on one rank."""
        return BLOCK[self.recipe] if self.activations else 1

    def quantises(self, linear: Linear, *, layer: int, num_layers: int) -> bool:
        """Whether a linear layer of a layer (numbered from 0 over all stages) is FP8."""
        ends = self.bf16_layers_at_ends
        return linear not in self.bf16_linears and ends <= layer < num_layers - ends

    def scale_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the scales of a `[rows, columns]` weight; Transformer Engine's padding of them is not counted."""
        if self.recipe == "tensorwise":
            return 4
        if self.recipe == "mxfp8":
            return rows * math.ceil(columns / BLOCK["mxfp8"])
        return 4 * math.ceil(rows / BLOCK["blockwise"]) * math.ceil(columns / BLOCK["blockwise"])


def linear_shapes(shape: Architecture, *, tp: int) -> dict[Linear, tuple[int, int]]:
    """Output and input features of the four linear layers on one tensor-parallel rank."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "qkv": ((query + 2 * key) // tp, shape.hidden_size),
        "proj": (shape.hidden_size, query // tp),
        "fc1": (2 * shape.ffn_size // tp, shape.hidden_size),
        "fc2": (shape.hidden_size, shape.ffn_size // tp),
    }


def saved_bytes(fp8: Fp8Config, shape: Architecture, *, tp: int, pp: int, stage: int) -> int:
    """Bytes by which the weights of a stage's rank are smaller than in bfloat16."""
    num_layers = shape.num_layers // pp
    first = stage * num_layers
    return sum(
        rows * columns - fp8.scale_bytes(rows, columns)
        for layer in range(first, first + num_layers)
        for linear, (rows, columns) in linear_shapes(shape, tp=tp).items()
        if fp8.quantises(linear, layer=layer, num_layers=shape.num_layers)
    )


def fp8_faults(name: str, fp8: Fp8Config, shape: Architecture | None, *, dtype: str, tp: int, sp: bool) -> list[str]:
    """Broken rules of one model's section; `shape` is None for a model that could not be read."""
    faults = []
    if dtype != "bfloat16":
        faults.append(f"{name}.fp8: what is not FP8 is bfloat16; set {name}.dtype=bfloat16, or leave fp8 out")
    if fp8.recipe != "blockwise" and fp8.scales != Fp8Config.model_fields["scales"].default:
        faults.append(f"{name}.fp8.scales={fp8.scales}: has no effect on recipe={fp8.recipe}; leave it out")
    if len(set(fp8.bf16_linears)) == 4:
        faults.append(f"{name}.fp8.bf16_linears: names all four linear layers and leaves none in FP8; leave fp8 out")
    if shape is None:
        return faults
    if 2 * fp8.bf16_layers_at_ends >= shape.num_layers:
        faults.append(
            f"{name}.fp8.bf16_layers_at_ends={fp8.bf16_layers_at_ends}: leaves none of {shape.num_layers} layers in"
            f" FP8; nearest valid: {(shape.num_layers - 1) // 2}"
        )
    return faults + _size_faults(name, fp8.recipe, shape, tp=tp, sp=sp)


def _size_faults(name: str, recipe: Recipe, shape: Architecture, *, tp: int, sp: bool) -> list[str]:
    uneven = _uneven_sizes(recipe, shape, tp=tp, sp=sp)
    if not uneven:
        return []
    valid = [
        str(size)
        for size in range(1, math.gcd(shape.num_kv_heads, shape.ffn_size) + 1)
        if shape.num_kv_heads % size == 0 and not _uneven_sizes(recipe, shape, tp=size, sp=sp and size > 1)
    ]
    remedy = f"set {name}.layout.tp={' or '.join(valid)}" if valid else "no tp is valid for this model"
    others = [one for one in BLOCK if one != recipe and not _uneven_sizes(one, shape, tp=tp, sp=sp)]
    remedy += "".join(f", or {name}.fp8.recipe={one}" for one in others)
    return [f"{name}.fp8.recipe={recipe} with {name}.layout.tp={tp}: {'; '.join(uneven)}; {remedy}"]


def _uneven_sizes(recipe: str, shape: Architecture, *, tp: int, sp: bool) -> list[str]:
    """Sizes that are no multiple of what they must be one of.

    A split must fall between two blocks, or scores would depend on tp; so must sequence parallelism's hidden states,
    whose blocks travel whole. An unsplit size may end in a smaller block, if the matrix products can read it.
    """
    features, block = _FEATURES[recipe], BLOCK[recipe]
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    split = {"heads": query, "query, key and value rows": query + 2 * key, "feed-forward size": shape.ffn_size}
    wanted = block if tp > 1 else features
    uneven = [
        f"{what} {size} / {tp} is no multiple of {wanted}" for what, size in split.items() if size % (tp * wanted) != 0
    ]
    of_hidden = block if sp else features
    if shape.hidden_size % of_hidden != 0:
        uneven.append(f"hidden size {shape.hidden_size} is no multiple of {of_hidden}")
    return uneven


def not_scoring_faults(name: str, fp8: Fp8Config | None, role: str) -> list[str]:
    """A model that does more than score; `role` says what: "trained", "sampled"."""
    if fp8 is None:
        return []
    return [f"{name}.fp8: only frozen models that score can be FP8, and this one is {role}; leave it out"]


def scales_faults(models: Mapping[str, Fp8Config | None]) -> list[str]:
    """Models of one job whose scales differ: Transformer Engine reads one setting per process."""
    names: dict[str, str] = {}
    for name, fp8 in models.items():
        if fp8 is not None and fp8.recipe == "blockwise":
            names.setdefault(fp8.scales, name)
    if len(names) < 2:
        return []
    (first, first_name), (second, second_name) = names.items()
    return [
        f"{second_name}.fp8.scales={second}: {first_name}.fp8.scales is {first}, and one process has one kind of"
        f" scales; set both to {first}"
    ]


def hardware_fault(fp8: Fp8Config, capability: tuple[int, int], cuda: tuple[int, int]) -> str | None:
    """Why a GPU cannot run the recipe, and what works there; None if it can.

    Args:
        capability: the GPU's compute capability, such as (9, 0) of Hopper.
        cuda: version of CUDA that torch was built with.
    """
    if not fp8.activations:
        return None
    named, here = f"recipe={fp8.recipe}", f"this GPU's compute capability is {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"{named}: needs compute capability 8.9, {here}; set activations=false"
    if fp8.recipe == "blockwise" and capability[0] == 9 and cuda < (12, 9):
        return f"{named}: needs CUDA 12.9, torch has {cuda[0]}.{cuda[1]}; set recipe=tensorwise"
    if fp8.recipe == "blockwise" and capability[0] == 10 and fp8.scales == "float32":
        return f"{named} with scales=float32: {here}; set scales=power_of_two, or recipe=mxfp8"
    works = {"tensorwise": True, "blockwise": capability[0] in (9, 10), "mxfp8": capability[0] == 10}
    if works[fp8.recipe]:
        return None
    needs = {"blockwise": "9 or 10", "mxfp8": "10"}[fp8.recipe]
    remedy = "recipe=blockwise" if works["blockwise"] else "recipe=tensorwise"
    return f"{named}: needs compute capability {needs}, {here}; set {remedy}"
