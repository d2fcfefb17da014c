"""One RL step with random weights on real CPU ranks, its memory ledger, and the plan of the very same configuration.

In: a case. Out, per rank: measured and planned bytes of every phase. Measured is what the owners hold (weights,
gradients, optimizer, KV cache) and by how much the process grew in the phase; the interpreter and its libraries are in
neither.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_overrides
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.jobs.run.load_models import memory_usage
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.planning.memory import phases_of_rank
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.work import work_of
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Span, SpannedSequence
from tools.bench.workload import NeverStop

_MMAP_THRESHOLD, _THRESHOLD_BYTES = -3, 64 * 1024  # mallopt(3)


@dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    num_ranks: int
    teacher: dict[str, Any]  # keys of the section beside `model`
    student: dict[str, Any]
    reference_offload: bool = False
    hidden: int = 256
    layers: int = 4
    vocab: int = 8192
    ffn: int = 704
    family: str = "Llama"
    num_sequences: int = 16
    prompt: int = 192
    completion: int = 64
    max_tokens_per_pack: int = 2048


@dataclass(frozen=True)
class Found:
    """Bytes of one phase on one rank."""

    phase: str
    measured: float
    planned: float

    @property
    def within(self) -> bool:
        """Within 10 % or 30 MiB, whichever is more."""
        return abs(self.planned - self.measured) <= max(0.1 * self.measured, 30 * 2**20)


def model_folder(case: Case, folder: Path) -> Path:
    """A folder that holds config.json alone."""
    config = {
        "architectures": [f"{case.family}ForCausalLM"],
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 32,
        "num_key_value_heads": case.hidden // 64,
        "head_dim": 32,
        "vocab_size": case.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def config_of(case: Case, folder: Path) -> TrainConfig:
    settings = {
        "output_dir": str(folder / "run"),
        "world_size": case.num_ranks,
        "teacher": {"model": str(folder), "dtype": "float32"} | case.teacher,
        "student": {"model": str(folder), "dtype": "float32"} | case.student,
        "data": {"path": str(folder)},
        "prompts": {"max_prompt_tokens": case.prompt},
        "rollout": {"max_completion_tokens": case.completion},
        "scoring": {"max_tokens_per_pack": case.max_tokens_per_pack},
        "grpo": {
            "questions_per_step": case.num_sequences // 4,
            "group_size": 4,
            "max_tokens_per_pack": case.max_tokens_per_pack,
            "reference": {"offload": case.reference_offload},
        },
    }
    return load_overrides(TrainConfig, settings, [])


def measure(case: Case, folder: Path) -> list[Found]:
    """Collective over the case's ranks; `folder` as `model_folder` made it."""
    # Large tensors go back to the system when they are freed, so that the process's size is what is alive.
    ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    config, shape = config_of(case, folder), Architecture.from_folder(folder)
    ledger = _ledger(case, config, shape)
    work = work_of(config, {"teacher": shape, "student": shape}, prompt=None, completion=None)
    planned = phases_of_rank(work, Platform.of(PlanConfig(config=folder, device="cpu")), dist.get_rank())
    kinds = ("weights", "gradients", "optimizer", "caches", "activations")
    return [
        Found(one.phase, sum(ledger[f"memory/{kind}_bytes/{one.phase}"] for kind in kinds), one.total)
        for one in planned
        if f"memory/weights_bytes/{one.phase}" in ledger
    ]


def _ledger(case: Case, config: TrainConfig, shape: Architecture) -> dict[str, float]:
    layout = build_layout(config.teacher.layout)
    model = _random_model(config.teacher, shape, layout)
    student = _frozen(config.student, shape, build_layout(config.student.layout))
    assert config.grpo.reference is not None
    reference = _frozen(config.teacher.model_copy(update={"offload": config.grpo.reference.offload}), shape, layout)
    engine = MegatronEngine(
        model,
        temperature=1.0,
        top_p=1.0,
        greedy=False,
        num_token_ids=shape.vocab_size,
        max_completion_tokens=case.completion,
        max_batch_size=config.rollout.max_batch_size,
        max_prefill_tokens=config.rollout.max_prefill_tokens,
        stop=NeverStop(),
    )
    readers = {
        "student": LogprobEngine(student, temperature=1.0, scoring=config.scoring),
        "old_policy": LogprobEngine(model, temperature=1.0, scoring=config.scoring),
        "reference": LogprobEngine(reference, temperature=1.0, scoring=config.scoring),
    }
    policy = Policy(
        model,
        optimizer=config.optimizer,
        blocks=config.scoring,
        temperature=1.0,
        max_tokens_per_pack=config.grpo.max_tokens_per_pack,
        micro_batch_size=config.grpo.micro_batch_size,
        num_updates=10,
    )
    requests, sequences = _inputs(case)
    policy.update(sequences[: policy.model.layout.dp], _loss)  # moments exist from the first update on
    ledger = MemoryLedger()
    ledger.watch(lambda: memory_usage(policy, (student, reference), engine))
    phases: dict[str, Callable[[], object]] = {"rollout": lambda: engine.generate(requests, 0)}
    phases |= {name: lambda reader=reader: reader.logprobs(sequences) for name, reader in readers.items()}  # type: ignore[misc]
    phases["update"] = lambda: policy.update(sequences, _loss)
    for name, run in phases.items():
        ledger.start()
        run()
        ledger.record(name)
    return ledger.take()


def _loss(batch: PackedBatch, logprobs: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
    del batch
    return -logprobs.sum() / 1e4, None


def _inputs(case: Case) -> tuple[list[SampleRequest], list[SpannedSequence]]:
    generator = torch.Generator().manual_seed(0)
    length = case.prompt + case.completion
    ids = torch.randint(0, case.vocab, (case.num_sequences, length), generator=generator)
    requests = [SampleRequest(ids[number // 4, : case.prompt], number) for number in range(case.num_sequences)]
    return requests, [SpannedSequence(row, (Span(case.prompt, length),)) for row in ids]


def _random_model(section: ModelConfig, shape: Architecture, layout: Layout) -> LanguageModel:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[section.dtype]
    model = build_model(shape, layout, dtype=dtype, recompute=section.recompute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    return model


def _frozen(section: ModelConfig, shape: Architecture, layout: Layout) -> LanguageModel:
    model = _random_model(section, shape, layout)
    model.requires_grad_(False)
    model.eval()
    if section.offload:
        model.offload()
    return model


def as_record(found: list[list[Found]]) -> list[list[dict[str, Any]]]:
    """Of all ranks, for a file."""
    return [[asdict(one) for one in rank] for rank in found]
