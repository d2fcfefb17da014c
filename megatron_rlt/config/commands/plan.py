"""`plan`: memory and time of another command's configuration, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from megatron_rlt.config.commands.job import CommandConfig
from megatron_rlt.config.devices import DEVICES, GIB, Device
from megatron_rlt.config.section import Fraction, PositiveFloat, PositiveInt

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|B)?", re.IGNORECASE)
_UNITS = {"gib": GIB, "gb": 10**9, "b": 1, "": 1}


def _as_text(value: object) -> object:
    """A number of bytes, which YAML reads as one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class PlanConfig(CommandConfig):
    """Plan a configuration: memory by phase on the fullest rank, what fits a GPU, hours. Needs neither weights nor GPU;
    of a model only its config.json."""

    config: Path
    """The configuration to plan, of any command that runs a model."""
    overrides: tuple[str, ...] = ()
    """Its overrides, each as KEY=VALUE."""
    device: Annotated[str, BeforeValidator(_as_text)] = "h100"
    """The GPU: a100, a100-40, l40s, h100, h100-pcie, h200, b200, cpu, or its memory such as 80GB or 75GiB."""
    reserve_gib: PositiveFloat = 2.0
    """Memory outside torch's allocator, in GiB: CUDA context and NCCL's buffers. Not measured: 1.5 to 3 are usual."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node; ranks are counted node by node."""
    nodes: PositiveInt | None = None
    """Nodes to plan for: sets world_size to nodes x gpus_per_node; null: the configuration's world_size."""
    hours: PositiveFloat | None = None
    """Hours within which the run should end: prints how many nodes that takes; null: not asked."""
    prompt_tokens: PositiveInt | None = None
    """Mean length of prompts in tokens, for times; null: every prompt is as long as allowed."""
    completion_tokens: PositiveInt | None = None
    """Mean length of completions in tokens, for times and the KV cache; null: as long as allowed."""
    calibrate: Path | None = None
    """metrics.jsonl of a run folder, from the same kind of GPU: rates by phase and lengths come from it."""
    scoring_share: Fraction = 0.47
    """Share of the bfloat16 peak in scoring, where nothing is calibrated (docs/gpu.md: one H100, 7B-shaped layers)."""
    update_share: Fraction = 0.38
    """The same of an update without recomputation (docs/gpu.md)."""

    @property
    def card(self) -> Device:
        """The GPU; the configuration must break no rule."""
        if self.device in DEVICES:
            return DEVICES[self.device]
        memory = _memory(self.device)
        assert memory is not None, "the rules refuse other words"
        return Device(self.device, (), memory, None, None, has_fp8=True)

    @property
    def is_cpu(self) -> bool:
        """Whether layers are those of CPU ranks."""
        return self.device == "cpu"

    def path_faults(self) -> list[str]:
        faults = [] if self.config.is_file() else [f"config: no such file: {self.config}; give a command's YAML file"]
        if self.calibrate is not None and not self.calibrate.is_file():
            faults.append(f"calibrate: no such file: {self.calibrate}; give metrics.jsonl of a run folder")
        elif self.calibrate is not None and not (self.calibrate.parent / "config.yaml").is_file():
            faults.append(
                f"calibrate: {self.calibrate.parent} holds no config.yaml, which says how many ranks ran; give"
                " metrics.jsonl in its run folder"
            )
        if not self.is_cpu and self.device not in DEVICES and _memory(self.device) is None:
            known = ", ".join(DEVICES)
            faults.append(f"device={self.device}: must be one of {known}, cpu, or a size of at least 1 GB such as 80GB")
        return faults


def _memory(text: str) -> int | None:
    """Bytes of `80GB`, `75GiB` or a plain number; None if it is none of them or too little for any model."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        return None
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()])
    return size if size >= 10**9 else None
