"""A tiny policy, vLLM beside it in either placement, and the dense model that says what is right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.config.sections import LayoutConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed, nucleus
from megatron_rlt.rollout.vllm.client import VllmServer
from megatron_rlt.rollout.vllm.colocated import VllmEngine
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.servers import ServedEngine
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.synced_engines import ColocatedVllm, ServedVllm
from megatron_rlt.rollout.weight_sync.sync import Receiver, WeightSync
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Completion, Span, SpannedSequence
from tests.models.loading import loaded_model
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

MAX_COMPLETION_TOKENS = 24
VOCAB_SIZE = 411  # the tiny tokenizer has 400 ids at most
STOP_IDS = (7, 50)
VERSIONS = (3, 4, 5)


@dataclass(frozen=True)
class Case:
    """One policy and how vLLM is laid out beside it."""

    name: str
    layout: LayoutConfig
    family: str
    tied: bool
    tp: int  # of vLLM
    temperature: float = 0.7
    top_p: float = 1.0
    num_ids: int = VOCAB_SIZE  # ids that may be sampled


class StopAtIds:
    """Ends a completion at one of some ids."""

    stop_ids = STOP_IDS
    end_tag: str | None = None

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        return sampled_ids[-1] in STOP_IDS


def make_requests() -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(300, (length,), generator=generator) for length in (40, 1, 12)]
    return [
        SampleRequest(prompt, completion_seed(11, 0, question, member))
        for question, prompt in enumerate(prompts)
        for member in range(8)
    ]


@dataclass(frozen=True)
class Beside:
    """A policy on this rank, and vLLM that follows it."""

    model: LanguageModel
    layout: Layout
    engine: ColocatedVllm | ServedVllm
    served: ServedEngine | None


def save_policy(folder: Path, case: Case) -> Path:
    tiny_hf_model(
        folder,
        case.family,
        tied=case.tied,
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        hidden_size=128,
        num_heads=4,
        head_dim=32,
    )
    return tiny_tokenizer(folder)


def build(folder: Path, case: Case, server: VllmServerConfig | None = None, run: Path | None = None) -> Beside:
    """vLLM in these ranks, or with `server` beside them."""
    layout = build_layout(case.layout)
    model, architecture = loaded_model(folder, layout, torch.float32)
    settings = VllmConfig(kv_cache_bytes=2**25, server=VllmServerConfig() if server is None else server)
    shape = EngineShape(folder, "float32", case.tp, 128, 16, 64, settings, on_gpu=False)
    sampling = Sampling(case.temperature, case.top_p, case.num_ids, VOCAB_SIZE, MAX_COMPLETION_TOKENS, StopAtIds())

    def sync(receiver: Receiver) -> WeightSync:
        return WeightSync(
            model, layout, receiver, trainer_logprobs=trainer, num_token_ids=case.num_ids, max_probe_gap=1e-3
        )

    def trainer(ids: Tensor) -> Tensor:
        return ask(model, layout, [SpannedSequence(ids, (Span(1, len(ids)),))], 1.0)[0]

    if server is None:
        holder = VllmModel(shape)
        colocated = ColocatedVllm(holder, VllmEngine(holder, architecture, sampling), sync(holder))
        return Beside(model, layout, colocated, None)
    assert run is not None, "a server writes its log there"
    served = ServedEngine(shape, architecture, sampling, server=server, folder=run)
    return Beside(model, layout, ServedVllm(served, sync(served), max_restarts=server.max_retries), served)


def first_server(beside: Beside) -> VllmServer:
    assert beside.served is not None
    return beside.served._servers[0]


def server_processes(beside: Beside) -> dict[str, psutil.Process]:
    """The server's own process and its engine core."""
    process = first_server(beside).process
    assert process is not None
    (api,) = psutil.Process(process._guard.pid).children()
    core = next(child for child in api.children(recursive=True) if "EngineCore" in " ".join(child.cmdline()))
    return {"api": api, "core": core}


def ask(
    model: LanguageModel, layout: Layout, sequences: Sequence[SpannedSequence], temperature: float
) -> tuple[Tensor, ...]:
    engine = LogprobEngine(
        model, layout, temperature=temperature, max_tokens_per_pack=512, row_block=64, vocab_block=512
    )
    return engine.logprobs(sequences).values


def train_a_little(model: torch.nn.Module) -> None:
    """A change that is the same for every shard and every copy of a weight, and large enough to be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def spanned(request: SampleRequest, completion: Completion) -> SpannedSequence:
    ids = torch.cat([request.token_ids, completion.token_ids])
    return SpannedSequence(ids, (Span(len(request.token_ids), len(ids)),))


def dense_rollout_logprobs(dense: Any, request: SampleRequest, completion: Completion, case: Case) -> Tensor:
    """transformers' distribution over the ids that may be sampled, within the nucleus."""
    ids = torch.cat([request.token_ids, completion.token_ids])
    with torch.no_grad():
        logits = dense(ids[None]).logits[0, len(request.token_ids) - 1 : -1, : case.num_ids]
    logprobs = torch.log_softmax(logits / case.temperature, dim=-1)
    if case.top_p < 1.0:
        logprobs = torch.log_softmax(logprobs.masked_fill(~nucleus(logprobs, case.top_p), float("-inf")), dim=-1)
    return logprobs.gather(1, completion.token_ids[:, None])[:, 0]


def assert_nothing_runs(folder: Path) -> None:
    """No process names the folder any more, some seconds after its trainer ended."""
    deadline = time.monotonic() + 30.0
    while left := [process for process in psutil.process_iter() if _names(process, folder)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def _names(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False
