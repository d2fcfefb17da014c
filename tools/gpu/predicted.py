"""The peak memory that `plan` predicts for one measured phase on one GPU, to stand beside what the card had."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import ModelConfig, ScoringConfig
from megatron_rlt.planning.memory import phases_of_rank
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.work import Held, Lengths, Pass, Sampling, Work

_NAME = "model"


def predicted_update(shape: Architecture, *, num_sequences: int, length: int, pack_tokens: int) -> float:
    """Bytes of an update of sequences of one length in packs of so many tokens, with optimizer and gradients."""
    one = Pass("update", _NAME, "update", num_sequences, pack_tokens, None)
    return _peak(shape, lengths=_lengths(length), one=one)


def predicted_scoring(
    shape: Architecture, fp8: Fp8Config | None, *, num_sequences: int, length: int, pack_tokens: int
) -> float:
    """Bytes of a scoring pass of a frozen model."""
    one = Pass("score", _NAME, "score", num_sequences, pack_tokens, None)
    return _peak(shape, lengths=_lengths(length), one=one, fp8=fp8)


def predicted_rollout(
    shape: Architecture, *, count: int, prompt: int, completion: int, max_prefill_tokens: int
) -> float:
    """Bytes of a rollout of the embedded engine, all completions of one prompt, with its caches."""
    lengths = Lengths(prompt, completion, prompt, completion)
    sampling = Sampling(_NAME, None, count, count, count, max_prefill_tokens)
    return _peak(shape, lengths=lengths, sampling=sampling)


def _lengths(length: int) -> Lengths:
    """As `random_sequences` makes them: all but the first tenth is scored."""
    prompt = max(length // 10, 1)
    return Lengths(prompt, length - prompt, prompt, length - prompt)


def _peak(
    shape: Architecture,
    *,
    lengths: Lengths,
    one: Pass | None = None,
    sampling: Sampling | None = None,
    fp8: Fp8Config | None = None,
) -> float:
    is_trained = one is not None and one.kind == "update"
    work = Work(
        world_size=1,
        held=(Held(_NAME, ModelConfig(model=Path("-"), fp8=fp8), shape, is_trained=is_trained, offload=False),),
        lengths=lengths,
        blocks=ScoringConfig(),
        sampling=sampling,
        passes=() if one is None else (one,),
        saves=None,
        num_pieces=None,
        piece="step",
    )
    phase = "rollout" if one is None else one.phase
    found = phases_of_rank(work, Platform.of(PlanConfig(config=Path("-"))), 0)
    return next(memory.total for memory in found if memory.phase == phase)
