"""Everything that changes during training, as one record for saving and resuming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlt.checkpoint.training_state import POLICY
from megatron_rlt.data.loader import ProblemStream
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy

SKIPPED = "skipped_in_a_row"
"""Counter of a checkpoint: updates without effect, in a row."""


class SampledAhead(Protocol):
    """Rollouts of the next step that were sampled ahead."""

    def state_bytes(self) -> bytes:
        """Serialize them (empty if there are none); collective."""

    def load_state_bytes(self, data: bytes) -> None:
        """Restore them; collective."""


class MeasuredOnce(Protocol):
    """What a run measured when it began, by name."""

    def counters(self) -> dict[str, float]:
        """For its checkpoints."""

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore it, from counters of which some are of others."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during training and is saved in checkpoints."""

    policy: Policy
    reference: LanguageModel | None
    stream: ProblemStream
    ahead: SampledAhead | None = None  # None: nothing is sampled ahead
    measured: MeasuredOnce | None = None  # None: nothing is measured

    @property
    def models(self) -> dict[str, LanguageModel]:
        models = {POLICY: self.policy.model}
        return models if self.reference is None else models | {"reference": self.reference}

    @contextmanager
    def onloaded(self, *, changes: bool) -> Iterator[None]:
        """Onload the weights of all models in the block; `changes` if it overwrites them."""
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(model.onloaded(changes=changes))
            yield
