"""Base and scaling of RoPE in a `config.json`, which can state them in two spellings."""

from __future__ import annotations

from typing import Any

from megatron_rlt.config.hf_config import HfConfig

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Positive numbers that each scaling needs, and those it may have; null stands for transformers' own value. The length
# before scaling may be left out, transformers then takes max_position_embeddings.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LENGTH = "original_max_position_embeddings"
_NEW, _OLD = "rope_parameters", "rope_scaling"  # of transformers 5, and before
_REMEDY = "correct the RoPE scaling in config.json"

Rope = tuple[float | None, dict[str, Any] | None]
"""Base (None: not stated) and scaling (None: plain RoPE)."""


def read_rope(values: HfConfig, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling with its `rope_type`; None: plain RoPE.

    Raises ValueError where both spellings state something, and not the same: transformers would take `rope_scaling`,
    with its own default for a base that only `rope_parameters` states.
    """
    new, old = (_resolve(values, name, max_positions) for name in (_NEW, _OLD))
    stated = [name for name in (_NEW, _OLD) if values.section(name)]
    if len(stated) == 2 and new != old:
        values.fail(
            f"{_NEW} and {_OLD} state two kinds of RoPE, {values.keys[_NEW]} and {values.keys[_OLD]}",
            f"remove the one that is wrong; transformers would take {_OLD}",
        )
    theta, scaling = old if stated == [_OLD] else new
    if theta is None:
        theta = values.number("rope_theta")  # is missing, and fails
    return theta, scaling


def _resolve(values: HfConfig, name: str, max_positions: int) -> Rope:
    """What one of the two spellings states."""
    parameters = values.section(name)
    theta = parameters.pop("rope_theta", None)
    if theta is not None:
        theta = values.positive_number(f"{name}.rope_theta", theta)
    elif values.has("rope_theta"):
        theta = values.number("rope_theta")
    if "factor" in parameters and not {"type", "rope_type"} & parameters.keys():
        values.fail(f"{name} states a factor and no rope_type, so that nothing would be scaled", _REMEDY)
    legacy_type = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", legacy_type)
    if rope_type not in _ROPE_TYPES:
        values.fail(f"RoPE type {rope_type!r} is not supported", f"supported are {', '.join(_ROPE_TYPES)}")
    for part in (parameters, values.keys):
        if part.get("partial_rotary_factor") not in (None, 1):
            values.fail("partial_rotary_factor must be 1", "use a model that rotates whole heads")
    _check_numbers(values, name, rope_type, parameters)
    if rope_type == "default":
        return theta, None
    if rope_type in ("llama3", "yarn"):
        length = parameters.setdefault(_LENGTH, max_positions)
        values.positive_integer(f"{name}.{_LENGTH}", length)
        if values.keys.get(_LENGTH, length) != length:
            values.fail(
                f"{_LENGTH} is {values.keys[_LENGTH]!r} at the top and {length!r} for {name}",
                f"state it in {name} alone",
            )
    return theta, {"rope_type": rope_type, **parameters}


def _check_numbers(values: HfConfig, name: str, rope_type: str, parameters: dict[str, Any]) -> None:
    for key in _NEEDED[rope_type]:
        if parameters.get(key) is None:
            values.fail(f"RoPE type {rope_type!r} needs the number {key!r}", _REMEDY)
        values.positive_number(f"{name}.{key}", parameters[key])
    for key in _OPTIONAL:
        if parameters.get(key) is not None:
            values.positive_number(f"{name}.{key}", parameters[key])
    if not isinstance(parameters.get("truncate"), bool | None):
        values.fail(f"{name}.truncate must be true or false, got {parameters['truncate']!r}", _REMEDY)
    if rope_type == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        values.fail(f"{name}.low_freq_factor must be below high_freq_factor", _REMEDY)
