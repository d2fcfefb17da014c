"""Finds the entries of the weight table that this rank's pipeline stage holds, and their parameters."""

from __future__ import annotations

from torch.nn import Parameter

from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.table import WeightPair, weight_pairs

_LAYERS = "decoder.layers."


def stage_parameters(model: LanguageModel) -> dict[str, tuple[WeightPair, Parameter]]:
    """Every parameter of this stage with its pair, by the pair's name, in the table's order.

    The model must not be wrapped by DistributedDataParallel, which prefixes parameter names.
    """
    parameters = {_global_name(model, name): parameter for name, parameter in model.named_parameters()}
    layers = {layer.layer_number - 1 for layer in model.decoder.layers}
    held: dict[str, tuple[WeightPair, Parameter]] = {}
    for pair in weight_pairs(model.architecture):
        names = [name for name in pair.megatron_names if name in parameters]
        if names:
            held[pair.name] = (pair, parameters.pop(names[0]))
        else:
            assert pair.layer not in layers, f"the model has no parameter for {pair.name}"
    assert not parameters, f"the weight table does not know {sorted(parameters)}"
    return held


def _global_name(model: LanguageModel, name: str) -> str:
    """Replace a stage's own layer index by the layer's index in the whole model, from 0."""
    if not name.startswith(_LAYERS):
        return name
    local, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
