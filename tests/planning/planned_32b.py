"""The plans in the documentation's table: a 7B teacher beside a 32B FP8 student on 4 and 8 nodes."""

from __future__ import annotations

from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.devices import GIB
from megatron_rlt.config.loading import load_overrides
from megatron_rlt.planning.memory import peak
from megatron_rlt.planning.planned import plan_configuration
from megatron_rlt.planning.seconds import total_seconds
from tests.docs.pages import ROOT

CONFIG = ROOT / "configs" / "rlt_qwen2.5-7b_student-32b_4x8_tp2sp_tp2sp_fp8.yaml"
WAYS = {
    "embedded engine": (),
    "vLLM, colocated": ("rollout.engine=vllm", "rollout.vllm.gpu_memory_share=0.3"),
    "vLLM, colocated, student offloaded": (
        "rollout.engine=vllm",
        "rollout.vllm.gpu_memory_share=0.3",
        "student.offload=true",
    ),
}


def row(nodes: int, way: str) -> str:
    """One line of the table, in Markdown."""
    given = {
        "config": str(CONFIG),
        "overrides": list(WAYS[way]),
        "nodes": nodes,
        "prompt_tokens": 1500,
        "completion_tokens": 4000,
    }
    planned = plan_configuration(load_overrides(PlanConfig, given, []))
    highest, seconds = peak(planned.memory), total_seconds(planned.seconds)
    assert planned.limit is not None
    assert planned.hours is not None
    sizes = {one.phase: one.total / GIB for one in planned.memory}
    numbers = (
        f"{sizes['rollout']:.1f}",
        f"{sizes['student']:.1f}",
        f"{sizes['update']:.1f}",
        f"{(planned.limit - highest.total) / GIB:.1f} ({highest.phase})",
        f"{planned.host.total / GIB:.0f}",
        f"{seconds:.0f}",
        f"{planned.hours:.1f}",
        f"{planned.hours * planned.work.world_size:.0f}",
    )
    return f"| {nodes} | {way} | " + " | ".join(numbers) + " |"
