"""`parity`: a `train`'s configuration, and what is compared under it."""

from __future__ import annotations

from typing import Literal

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.folders.description import is_hugging_face
from megatron_rlt.config.models import Shapes
from megatron_rlt.config.section import PositiveFloat, PositiveInt, Section


class ParityCheckConfig(Section):
    """Which tokens are compared, and by how much log-probs may differ."""

    completions: Literal["sampled", "given"] = "sampled"
    """Completions of the rows' prompts: sampled by the sampling engine, or given as each row's reasoning_trace, for
    which the engine has no log-probs to compare."""
    num_rows: PositiveInt = 8
    """Rows compared, from the first of the data set on; fewer if it has fewer."""
    max_gap: PositiveFloat = 1e-3
    """Largest accepted difference between two log-probs of a token, in nats; above it the exit status is 1. With dtype
    bfloat16, 0.5 is usual."""


class ParityConfig(TrainConfig):
    """Compare log-probs of the same tokens by transformers, by Megatron in a `train`'s layouts and by its engine."""

    parity: ParityCheckConfig = ParityCheckConfig()
    """What is compared, and the bound."""

    def faults(self, shapes: Shapes) -> list[str]:
        others = [f"{name}.model" for name, model in self.models.items() if not is_hugging_face(model.model)]
        return [
            *super().faults(shapes),
            *(
                f"{key}: transformers, with which parity compares, reads Hugging Face folders only; convert it"
                " (`megatron-rlt convert SOURCE TARGET --to hf`)"
                for key in others
            ),
        ]
