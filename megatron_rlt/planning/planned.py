"""A whole plan: memory by phase, time, and what would fit, from a `plan` configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.planning.calibration import Calibration, read_calibration
from megatron_rlt.planning.memory import HostMemory, PhaseMemory, host_memory, peak, peaks
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.remedies import Outcome, Remedy, remedies
from megatron_rlt.planning.sampling import vllm_claim_bytes, vllm_floor_bytes
from megatron_rlt.planning.seconds import PhaseSeconds, Shares, step_seconds, total_seconds
from megatron_rlt.planning.target import Target, changed, load_target
from megatron_rlt.planning.work import Work, work_of

_MOST_NODES = 128


@dataclass(frozen=True)
class Planned:
    """Everything that the command prints."""

    target: Target
    work: Work
    platform: Platform
    memory: tuple[PhaseMemory, ...]
    limit: float | None  # bytes for torch's allocator on a GPU; None on CPU ranks
    host: HostMemory
    seconds: tuple[PhaseSeconds, ...]
    remedies: tuple[Remedy, ...]  # only where it does not fit
    vllm_shortage: float  # bytes by which vLLM's claim is below what it needs to start; 0: none
    nodes_for_hours: int | None  # fewest nodes with which the run ends in time; None: not asked, or not found

    @property
    def fits(self) -> bool:
        return self.vllm_shortage <= 0 and (self.limit is None or peak(self.memory).total <= self.limit)

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where its length or every rate is unknown."""
        if self.work.num_pieces is None or not self.seconds:
            return None
        return self.work.num_pieces * total_seconds(self.seconds) / 3600


class Planner:
    """Plans configurations on one platform, with one set of rates and mean lengths."""

    def __init__(self, config: PlanConfig) -> None:
        """Raises ValueError for a calibration that cannot be read."""
        self._config = config
        self.platform = Platform.of(config)
        self._shares = Shares(config.scoring_share, config.update_share)
        self._calibration: Calibration | None = None if config.calibrate is None else read_calibration(config.calibrate)

    @property
    def limit(self) -> float | None:
        device = self.platform.device
        return None if device is None else device.memory_bytes - self.platform.reserved_bytes

    def work(self, target: Target, config: JobConfig) -> Work:
        known = self._calibration
        prompt: float | None = self._config.prompt_tokens
        completion: float | None = self._config.completion_tokens
        if known is not None:
            prompt = prompt or known.prompt_tokens
            completion = completion or known.completion_tokens
        return work_of(config, target.shapes, prompt=prompt, completion=completion)

    def seconds(self, work: Work) -> tuple[PhaseSeconds, ...]:
        return step_seconds(work, self.platform, self._shares, self._calibration)

    def outcome(self, target: Target, config: JobConfig) -> Outcome:
        work = self.work(target, config)
        return Outcome(peak(peaks(work, self.platform)), work.world_size * total_seconds(self.seconds(work)))


def plan_configuration(config: PlanConfig) -> Planned:
    """Plan it. Raises ValueError with one line per fault of the configuration that is planned."""
    target, planner = load_target(config), Planner(config)
    work, platform = planner.work(target, target.config), planner.platform
    memory, limit = peaks(work, platform), planner.limit
    found: list[Remedy] = []
    if limit is not None and peak(memory).total > limit:
        found = remedies(
            target.config,
            target.shapes,
            limit=limit,
            gpus_per_node=config.gpus_per_node,
            has_fp8=platform.device is not None and platform.device.has_fp8,
            try_out=lambda other: planner.outcome(target, other),
        )
    claim = vllm_claim_bytes(work, platform)
    return Planned(
        target=target,
        work=work,
        platform=platform,
        memory=memory,
        limit=limit,
        host=host_memory(work, platform),
        seconds=planner.seconds(work),
        remedies=tuple(found),
        vllm_shortage=max(0.0, vllm_floor_bytes(work) - claim) if claim else 0.0,
        nodes_for_hours=_nodes_for(config, target, planner),
    )


def _nodes_for(config: PlanConfig, target: Target, planner: Planner) -> int | None:
    """The fewest nodes, of those that every layout allows, on which the run ends within `hours`."""
    if config.hours is None:
        return None
    for nodes in range(1, _MOST_NODES + 1):
        other = changed(target.config, "world_size", nodes * config.gpus_per_node)
        if other.faults(target.shapes):
            continue
        work = planner.work(target, other)
        seconds = total_seconds(planner.seconds(work))
        if work.num_pieces is not None and 0 < work.num_pieces * seconds <= 3600 * config.hours:
            return nodes
    return None
