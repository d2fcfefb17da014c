"""What a plan knows of the machine: the GPU or CPU ranks, what its layers are, and memory that is nobody's tensor."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.devices import GIB, Device
from megatron_rlt.config.models import BLOCKS, ModelConfig, ScoringConfig

# What Megatron's published runs hold beyond weights, gradients and optimizer: 96 to 109 MiB in five layouts.
_WORKSPACE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Platform:
    """Where the ranks run."""

    device: Device | None  # None: CPU ranks
    reserved_bytes: int  # outside the allocator
    gpus_per_node: int

    @classmethod
    def of(cls, config: PlanConfig) -> Platform:
        if config.is_cpu:
            return cls(None, 0, config.gpus_per_node)
        return cls(config.card, int(config.reserve_gib * GIB), config.gpus_per_node)

    @property
    def workspace_bytes(self) -> int:
        return 0 if self.device is None else _WORKSPACE_BYTES

    def is_fused(self, model: ModelConfig) -> bool:
        """Whether layers are Transformer Engine's, as `models/spec.py` decides."""
        return self.device is not None and model.dtype == "bfloat16"

    def blocks(self, scoring: ScoringConfig) -> tuple[int, int]:
        """Rows and vocabulary entries of a block of logits."""
        rows, entries = BLOCKS["cpu" if self.device is None else "cuda"]
        return scoring.row_block or rows, scoring.vocab_block or entries
