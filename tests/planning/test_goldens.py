"""The planner's formulas against memory that Megatron-LM publishes for its own functional tests on 8 x H100.

`golden_values_dev_dgx_h100.json` in NVIDIA/Megatron-LM at d98e8a6, `tests/functional_tests/test_cases/gpt/<case>`:
`mem-allocated-bytes` (what stays), `mem-max-allocated-bytes` (the peak); sizes from `model_config.yaml` beside it.
Those runs keep all logits: 6 bytes of each, a bfloat16 copy and a float32 one. The 128 GPUs of the last case follow
from what it keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from megatron_rlt.config.plan import DTYPE_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES
from megatron_rlt.planning.activations import LayerForm, Split, Stage, training_bytes

_MIB = 2**20
_WORKSPACE = 100  # MiB


@dataclass(frozen=True)
class Golden:
    """One case; GPT with four times the hidden size in between, without a gate."""

    name: str
    kept: float  # MiB
    peak: float  # MiB
    layers: int = 12
    hidden: int = 512
    key_share: float = 1.0  # key-value heads per head
    vocab: int = 50_257
    is_tied: bool = True
    positions: int = 1024
    is_rotary: bool = False
    has_dropout: bool = True
    tokens: int = 4 * 1024  # of a micro-batch
    num_batches: int = 4
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False
    recompute: str = "none"
    is_distributed: bool = True  # the optimizer

    @property
    def shard(self) -> int:
        """Vocabulary entries of a rank: padded to a multiple of 128 x tp."""
        return math.ceil(self.vocab / (128 * self.tp)) * 128

    def parameters(self, stage: int) -> float:
        layer = (2 * (1 + self.key_share) + 8) * self.hidden**2
        table = self.shard * self.hidden
        is_first, is_last = stage == 0, stage == self.pp - 1
        tables = 1 if self.is_tied and self.pp == 1 else int(is_first) + int(is_last)
        positions = self.positions * self.hidden if is_first and not self.is_rotary else 0
        return layer * self.layers / self.pp / self.tp + tables * table + positions

    def states(self, stage: int) -> float:
        """MiB of weights, gradients, optimizer and workspaces."""
        owners = self.dp * self.cp if self.is_distributed else 1
        each = DTYPE_BYTES["bfloat16"] + GRADIENT_BYTES + OPTIMIZER_BYTES["bfloat16"] / owners
        return self.parameters(stage) * each / _MIB + _WORKSPACE

    def activations(self, stage: int) -> float:
        """MiB at the fullest moment."""
        form = LayerForm(
            hidden=self.hidden,
            query=self.hidden,
            key=int(self.key_share * self.hidden),
            ffn=4 * self.hidden,
            head_dim=128,
            is_gated=False,
            is_rotary=self.is_rotary,
            has_dropout=self.has_dropout,
        )
        tokens, is_last = self.tokens / self.cp, stage == self.pp - 1
        in_flight = min(self.pp - stage, self.num_batches)
        return (
            training_bytes(
                form,
                Split(self.tp, self.tp if self.sp else 1),
                Stage(self.layers // self.pp, is_first=stage == 0, is_last=is_last, in_flight=in_flight),
                tokens=tokens,
                recompute=self.recompute,
                output_bytes=6 * tokens * self.shard if is_last else 0.0,
                dtype_bytes=2,
                is_fused=True,
            )
            / _MIB
        )


GOLDENS = (
    Golden("te_tp1_pp1_resume_torch_dist_dist_optimizer", 555, 2567, dp=8),
    Golden("te_tp1_pp1_uniform_full_recompute", 1201, 2443, dp=8, recompute="full", is_distributed=False),
    Golden("te_tp2_pp2_cp2", 487, 892, tp=2, pp=2, cp=2, sp=True, is_distributed=False),
    Golden("te_tp4_pp1_dist_optimizer_overlap_grad_reduce", 285, 994, tp=4, dp=2),
    Golden("te_tp2_pp2_resume_torch_dist", 493, 1362, tp=2, pp=2, dp=2, is_distributed=False),
    Golden(
        "gpt3_7b_tp4_pp1_memory_speed",
        *(19_706, 54_497, 32, 4096, 0.25, 131_072),
        is_tied=False,
        positions=8192,
        tokens=2 * 8192,
        tp=4,
        dp=2,
    ),
    Golden(
        "gpt3_15b_8t_release",
        *(12_654, 26_856, 32, 6144, 1 / 6, 256_000),
        is_tied=False,
        is_rotary=True,
        has_dropout=False,
        tokens=4 * 4096,
        tp=8,
        dp=16,
        sp=True,
    ),
)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_states_and_peak_are_within_five_percent_of_what_megatron_measured(golden: Golden) -> None:
    stages = range(golden.pp)
    assert max(map(golden.states, stages)) == pytest.approx(golden.kept, rel=0.05)
    peak = max(golden.states(stage) + golden.activations(stage) for stage in stages)
    assert peak == pytest.approx(golden.peak, rel=0.05)
