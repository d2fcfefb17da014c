"""`megatron-rlt plan`: prints memory by phase, host memory, time, and what would fit. Imports no torch."""

from __future__ import annotations

from rich.console import Console

from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.devices import GIB
from megatron_rlt.config.display import NumberTable
from megatron_rlt.planning.memory import peak
from megatron_rlt.planning.planned import Planned, plan_configuration
from megatron_rlt.planning.seconds import total_seconds


def run_plan(config: PlanConfig) -> None:
    """Plan a configuration and print it. Raises ValueError with one line per fault."""
    planned = plan_configuration(config)
    console = Console()
    for part in (_memory(planned), _verdict(planned), _host(planned), _time(planned), _duration(config, planned)):
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    if planned.remedies:
        console.print(_remedies(planned), highlight=False)
    elif not planned.fits:
        console.print("Nothing near was found that fits: take more nodes, or a larger GPU.", soft_wrap=True)


def _memory(planned: Planned) -> NumberTable:
    work, device = planned.work, planned.platform.device
    name = "CPU ranks" if device is None else f"{device.name}, {_gib(device.memory_bytes)} GiB each"
    headings = ("phase", "weights", "gradients", "optimizer", "caches", "activations", "buffers", "sum", "rank", "left")
    ranks = f"{work.world_size} rank{'' if work.world_size == 1 else 's'}"
    table = NumberTable(f"{planned.target.command} on {ranks} ({name}): GiB of the fullest rank", headings)
    for one in planned.memory:
        parts = (one.weights, one.gradients, one.optimizer, one.caches, one.activations, one.buffers, one.total)
        left = "" if planned.limit is None else _gib(planned.limit - one.total)
        table.add_line(one.phase, *(_gib(part) for part in parts), str(one.rank), left)
    return table


def _verdict(planned: Planned) -> str:
    highest = peak(planned.memory)
    line = f"\nPeak: {_gib(highest.total)} GiB in {highest.phase}, on rank {highest.rank}."
    if planned.limit is None:
        return line
    reserved = f"{_gib(planned.platform.reserved_bytes)} GiB reserved for CUDA and NCCL"
    rest = planned.limit - highest.total
    line += (
        f" With {reserved}, {_gib(rest)} GiB are left."
        if rest >= 0
        else (f" With {reserved}, it does not fit: {_gib(-rest)} GiB are missing.")
    )
    if planned.vllm_shortage > 0:
        line += (
            f" vLLM would not start: its claim is {_gib(planned.vllm_shortage)} GiB below its weights and the cache of"
            " one longest sequence; raise rollout.vllm.gpu_memory_share or rollout.vllm.tp."
        )
    return line


def _host(planned: Planned) -> NumberTable:
    table = NumberTable("\nGiB of host memory per node, beside the processes themselves", ("for", "GiB"))
    for name, size in planned.host.parts.items():
        table.add_line(name, _gib(size))
    table.add_line("sum", _gib(planned.host.total))
    return table


def _time(planned: Planned) -> NumberTable:
    work = planned.work
    lengths = f"prompts of {work.lengths.prompt:,.0f}, completions of {work.lengths.completion:,.0f} tokens"
    table = NumberTable(f"\nSeconds per {work.piece}: {lengths}", ("phase", "rate", "PFLOP", "seconds"), text_columns=2)
    for one in planned.seconds:
        table.add_line(one.phase, one.ground, f"{one.model_flops / 1e15:,.1f}", f"{one.seconds:,.1f}")
    table.add_line("sum", "", "", f"{total_seconds(planned.seconds):,.1f}")
    return table


def _duration(config: PlanConfig, planned: Planned) -> str:
    work, hours = planned.work, planned.hours
    if hours is None:
        return "\nHow long the whole run takes is unknown: its length, or the GPU's peak, is."
    line = f"\n{work.num_pieces:,} {work.piece}s: {hours:,.1f} hours, {hours * work.world_size:,.0f} GPU-hours."
    if config.hours is None:
        return line
    nodes = planned.nodes_for_hours
    if nodes is None:
        return f"{line} No number of nodes was found on which it ends within {config.hours:g} hours."
    return f"{line} Within {config.hours:g} hours: {nodes} node(s) of {config.gpus_per_node}."


def _remedies(planned: Planned) -> NumberTable:
    title = "\nWhat fits, the least GPU time first"
    table = NumberTable(title, ("change", "GiB", "phase", "left", "GPU-seconds per " + planned.work.piece))
    for one in planned.remedies:
        change = " ".join(f"{key}={_value(value)}" for key, value in one.change.items())
        highest = one.outcome.peak
        assert planned.limit is not None, "only GPUs have a limit"
        left = _gib(planned.limit - highest.total)
        table.add_line(change, _gib(highest.total), highest.phase, left, f"{one.outcome.gpu_seconds:,.0f}")
    return table


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "{}" if hasattr(value, "model_fields_set") else str(value)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f}"
