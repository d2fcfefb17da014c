"""A tiny Qwen2 trained for real on test ranks: Megatron's DDP, distributed optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlt.checkpoint.folders import CheckpointInfo
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import CapturedState, capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import LoadedState, SharedState, load_training_state
from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig, Reshardable
from megatron_rlt.models.build import build_model
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.platform import world
from megatron_rlt.policy.policy import Policy
from megatron_rlt.types import Span, SpannedSequence

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="cosine", min_lr=1e-4)  # every update changes weights


@dataclass
class Training:
    """A policy and the number of its updates."""

    policy: Policy
    reference: Any
    num_updates: int = 0

    def update(self) -> float:
        """One update on sequences derived from its number; returns the loss."""
        generator = torch.Generator().manual_seed(self.num_updates)
        sequences = [
            SpannedSequence(torch.randint(0, 131, (8 + 2 * index,), generator=generator), (Span(2, 8 + 2 * index),))
            for index in range(4)
        ]
        total = sum(sequence.num_targets for sequence in sequences)

        def loss(batch: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, float]:
            value = -logprobs.sum() / total
            return value, float(value.detach())

        self.num_updates += 1
        return sum(self.policy.update(sequences, loss).records)

    def capture(
        self,
        *,
        num_updates: int | None = None,
        step: int | None = None,
        reshardable: Reshardable = "full",
        copy: bool = False,
    ) -> CapturedState:
        return capture_training_state(
            self.num_updates if step is None else step,
            models={"policy": self.policy.model, "reference": self.reference},
            optimizer=self.policy.optimizer,
            scheduler=self.policy.scheduler,
            rank_state=RankState.capture(extra=b"mine"),
            shared_state=SharedState(b"row 17", {"skipped": 2, "best": 0.1}),
            num_updates=self.num_updates if num_updates is None else num_updates,
            reshardable=reshardable,
            copy=copy,
        )

    def save(self, folder: Path, *, keep_last: int = 3, **options: Any) -> CheckpointInfo:
        """`options`: of `capture`."""
        return write_training_state(self.capture(**options), folder, keep_last=keep_last, group=world())

    def load(self, info: CheckpointInfo) -> LoadedState:
        loaded = load_training_state(
            info,
            models={"policy": self.policy.model, "reference": self.reference},
            optimizer=self.policy.optimizer,
            scheduler=self.policy.scheduler,
        )
        self.num_updates = loaded.num_updates
        return loaded

    def state_bits(self) -> list[Tensor]:
        """This rank's weights, fp32 main weights, moments and learning rate."""
        tensors = [weight.detach().clone() for weight in self.policy.model.parameters()]
        tensors += [weight.detach().clone() for weight in self.reference.parameters()]
        for part in self.policy.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                tensors.append(torch.tensor([group["lr"], group["weight_decay"]], dtype=torch.float64))
                for weight in group["params"]:
                    state = part.optimizer.state[weight]
                    tensors += [weight.detach().clone(), *(state[key].clone() for key in sorted(state))]
        return tensors


def tiny_training(model: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> Training:
    architecture = Architecture.from_folder(model)
    policy_model, reference = (build_model(architecture, layout, dtype=dtype, recompute="none") for _ in range(2))
    load_hf_weights(policy_model, model)
    load_hf_weights(reference, model)
    policy = Policy(
        policy_model,
        optimizer=OPTIMIZER,
        blocks=ScoringConfig(),
        temperature=0.7,
        max_tokens_per_pack=16384,
        micro_batch_size=2,
        num_updates=10,
    )
    return Training(policy, reference)


def layout_of(tp: int, pp: int, cp: int) -> Layout:
    return build_layout(LayoutConfig(tp=tp, pp=pp, sp=tp > 1, cp=cp))
