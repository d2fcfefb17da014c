"""What a configuration lets its models do, whatever the command: models held, sampling, passes, update, saves.

Lengths are bounds: prompt and completion as long as allowed. `Lengths` has what is expected on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.models import ModelConfig, ScoringConfig, Shapes
from megatron_rlt.config.paths import count_rows
from megatron_rlt.config.rollout import VllmConfig
from megatron_rlt.config.training import CheckpointConfig

REFERENCE = "reference"


@dataclass(frozen=True)
class Held:
    """One model of the job; a reference is one beside its policy."""

    name: str
    model: ModelConfig
    shape: Architecture
    is_trained: bool
    offload: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions."""

    max_prompt: int
    max_completion: int
    prompt: float  # mean
    completion: float  # mean

    @property
    def longest(self) -> int:
        return self.max_prompt + self.max_completion

    @property
    def mean(self) -> float:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Sampling:
    """Completions that one model samples per step or part."""

    name: str  # of the model
    vllm: VllmConfig | None  # None: the embedded engine
    num_completions: int
    group_size: int  # completions of one prompt
    max_batch_size: int
    max_prefill_tokens: int


@dataclass(frozen=True)
class Pass:
    """Sequences that one model reads per step or part."""

    phase: str
    name: str  # of the model
    kind: Literal["score", "update"]
    num_sequences: int
    max_tokens_per_pack: int
    max_sequences_per_pack: int | None
    num_updates: int = 1

    def pack_tokens(self, lengths: Lengths, dp: int) -> int:
        """Tokens of the largest pack on a replica."""
        share = math.ceil(self.num_sequences / self.num_updates / dp)
        most = share if self.max_sequences_per_pack is None else min(share, self.max_sequences_per_pack)
        return max(lengths.longest, min(self.max_tokens_per_pack, most * lengths.longest))

    def num_packs(self, lengths: Lengths, dp: int) -> int:
        """Packs of one optimizer step on a replica, of sequences of mean length."""
        share = math.ceil(self.num_sequences / self.num_updates / dp)
        fitting = max(1, int(self.max_tokens_per_pack // lengths.mean))
        if self.max_sequences_per_pack is not None:
            fitting = min(fitting, self.max_sequences_per_pack)
        return max(1, math.ceil(share / fitting))


@dataclass(frozen=True)
class Work:
    """Everything of a configuration that decides memory and time."""

    world_size: int
    held: tuple[Held, ...]
    lengths: Lengths
    blocks: ScoringConfig
    sampling: Sampling | None
    passes: tuple[Pass, ...]
    saves: CheckpointConfig | None  # None: nothing is trained
    num_pieces: int | None  # steps or parts; None: unknown without the data
    piece: str  # "step" or "part"

    def model(self, name: str) -> Held:
        return next(one for one in self.held if one.name == name)

    @property
    def trained(self) -> Held | None:
        return next((one for one in self.held if one.is_trained), None)


def work_of(config: JobConfig, shapes: Shapes, *, prompt: float | None, completion: float | None) -> Work:
    """Read a checked configuration.

    Args:
        prompt, completion: mean tokens; None: as long as allowed.

    Raises:
        ValueError: the command runs no model on ranks.
    """
    if isinstance(config, RlConfig):
        return _rl_work(config, shapes, prompt, completion)
    if isinstance(config, SftConfig):
        return _sft_work(config, shapes, prompt, completion)
    if isinstance(config, ScoreConfig):
        return _score_work(config, shapes, prompt, completion)
    if isinstance(config, CollectConfig):
        return _collect_work(config, shapes, prompt, completion)
    if isinstance(config, EvaluateConfig):
        return _evaluate_work(config, shapes, prompt, completion)
    raise ValueError(f"{type(config).__name__} has nothing to plan; give the configuration of a command with models")


def _lengths(max_prompt: int, max_completion: int, prompt: float | None, completion: float | None) -> Lengths:
    return Lengths(
        max_prompt,
        max_completion,
        max_prompt if prompt is None else min(prompt, max_prompt),
        max_completion if completion is None else min(completion, max_completion),
    )


def _frozen(name: str, model: ModelConfig, shape: Architecture) -> Held:
    return Held(name, model, shape, is_trained=False, offload=model.offload)


def _scored(phase: str, name: str, count: int, scoring: ScoringConfig) -> Pass:
    return Pass(phase, name, "score", count, scoring.max_tokens_per_pack, None)


def _rl_work(config: RlConfig, shapes: Shapes, prompt: float | None, completion: float | None) -> Work:
    grpo, policy, rollout = config.grpo, config.policy_name, config.rollout
    count = grpo.questions_per_step * grpo.group_size
    held = [Held(policy, config.policy, shapes[policy], is_trained=True, offload=False)]
    others = {name: model for name, model in config.models.items() if name != policy}
    held += [_frozen(name, model, shapes[name]) for name, model in others.items()]
    passes = [_scored(name, name, count, config.scoring) for name in others]
    passes.append(_scored("old_policy", policy, count, config.scoring))
    if grpo.reference is not None:
        held.append(Held(REFERENCE, config.policy, shapes[policy], is_trained=False, offload=grpo.reference.offload))
        passes.append(_scored(REFERENCE, REFERENCE, count, config.scoring))
    sequences = (grpo.max_tokens_per_pack, grpo.micro_batch_size)
    passes.append(Pass("update", policy, "update", count, *sequences, num_updates=grpo.updates_per_batch))
    return Work(
        world_size=config.world_size,
        held=tuple(held),
        lengths=_lengths(config.prompts.max_prompt_tokens, rollout.max_completion_tokens, prompt, completion),
        blocks=config.scoring,
        sampling=Sampling(
            policy,
            rollout.vllm if rollout.engine == "vllm" else None,
            count,
            grpo.group_size,
            rollout.max_batch_size,
            rollout.max_prefill_tokens,
        ),
        passes=tuple(passes),
        saves=config.checkpoint,
        num_pieces=config.num_steps,
        piece="step",
    )


def _sft_work(config: SftConfig, shapes: Shapes, prompt: float | None, completion: float | None) -> Work:
    count = config.global_batch_size
    num_rows = count_rows(config.data.path) if config.data.path.exists() else None
    known = config.num_steps is not None or num_rows is not None
    mean = config.max_tokens if completion is None else min(config.max_tokens, completion + (prompt or 0))
    return Work(
        world_size=config.world_size,
        held=(Held("model", config.model, shapes["model"], is_trained=True, offload=False),),
        lengths=Lengths(0, config.max_tokens, 0, mean),
        blocks=config.scoring,
        sampling=None,
        passes=(Pass("update", "model", "update", count, config.max_tokens_per_pack, config.micro_batch_size),),
        saves=config.checkpoint,
        num_pieces=config.num_updates(num_rows=num_rows) if known else None,
        piece="step",
    )


def _score_work(config: ScoreConfig, shapes: Shapes, prompt: float | None, completion: float | None) -> Work:
    longest = config.scoring.max_tokens_per_pack  # explanations have no bound here: a pack's worth stands for one
    max_prompt = min(config.prompts.max_prompt_tokens, longest // 2)
    num_rows = count_rows(config.input) if config.input.exists() else None
    count = config.rows_per_part
    return Work(
        world_size=config.world_size,
        held=tuple(_frozen(name, model, shapes[name]) for name, model in config.models.items()),
        lengths=_lengths(max_prompt, longest - max_prompt, prompt, completion),
        blocks=config.scoring,
        sampling=None,
        passes=tuple(_scored(name, name, count, config.scoring) for name in ("student", "teacher")),
        saves=None,
        num_pieces=None if num_rows is None else math.ceil(num_rows / count),
        piece="part",
    )


def _collect_work(config: CollectConfig, shapes: Shapes, prompt: float | None, completion: float | None) -> Work:
    rollout, count = config.rollout, config.questions_per_part * config.num_explanations
    num_rows = count_rows(config.data) if config.data.exists() else None
    scorers = () if config.student is None else ("student", "teacher")
    return Work(
        world_size=config.world_size,
        held=tuple(_frozen(name, model, shapes[name]) for name, model in config.models.items()),
        lengths=_lengths(config.prompts.max_prompt_tokens, rollout.max_completion_tokens, prompt, completion),
        blocks=config.scoring,
        sampling=Sampling(
            "teacher",
            rollout.vllm if rollout.engine == "vllm" else None,
            count,
            config.num_explanations,
            rollout.max_batch_size,
            rollout.max_prefill_tokens,
        ),
        passes=tuple(_scored(name, name, count, config.scoring) for name in scorers),
        saves=None,
        num_pieces=None if num_rows is None else math.ceil(num_rows / config.questions_per_part),
        piece="part",
    )


def _evaluate_work(config: EvaluateConfig, shapes: Shapes, prompt: float | None, completion: float | None) -> Work:
    asked, count = config.sampling, config.questions_per_part * config.sampling.num_samples
    return Work(
        world_size=config.world_size,
        held=(_frozen("model", config.model, shapes["model"]),),
        lengths=_lengths(config.prompts.max_prompt_tokens, asked.max_completion_tokens, prompt, completion),
        blocks=ScoringConfig(),
        sampling=Sampling("model", None, count, asked.num_samples, asked.max_batch_size, asked.max_prefill_tokens),
        passes=(),
        saves=None,
        num_pieces=None,
        piece="part",
    )
