"""A tiny policy, vLLM beside it in either placement, and the dense model that says what is right."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed, nucleus
from megatron_rlt.rollout.vllm.client import ServerClient
from megatron_rlt.rollout.vllm.colocated import ColocatedEngine
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.server_engine import ServerEngine
from megatron_rlt.rollout.vllm.servers import VllmServers
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.transfer.direct import weight_transport
from megatron_rlt.rollout.weight_sync.sync import Receiver, WeightSync
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Completion, Span, SpannedSequence, tell_nobody
from tests.models.loading import loaded_model
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.vllm.gloo_transfer import replace_nccl
from tests.vllm.server_plugin import use_plugin

MAX_COMPLETION_TOKENS = 24
TIMEOUT_SECONDS = 900.0  # of several server starts on a crowded machine
VOCAB_SIZE = 411  # the tiny tokenizer has 400 ids at most
STOP_IDS = (7, 50)


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
class Colocated:
    """A policy on this rank, and vLLM in the same ranks."""

    model: LanguageModel
    engine: ColocatedEngine


@dataclass(frozen=True)
class Served:
    """A policy on this rank, and vLLM's servers beside the ranks."""

    model: LanguageModel
    engine: ServerEngine
    servers: VllmServers

    @property
    def first(self) -> ServerClient:
        return self.servers._servers[0]

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The first server's own process and its engine core."""
        api = api_process(self.first)
        core = next(child for child in api.children(recursive=True) if "EngineCore" in " ".join(child.cmdline()))
        return {"api": api, "core": core}


def api_process(server: ServerClient) -> psutil.Process:
    assert server.process is not None
    (inner_guard,) = psutil.Process(server.process._guard.pid).children()
    (api,) = inner_guard.children()
    return api


PARTS = (range(8), range(8, 24))  # of `make_requests`


def collect_parts(engine: ServerEngine, policy_version: int) -> dict[int, tuple[Completion, ...]]:
    """All that was started, by part."""
    come: dict[int, tuple[Completion, ...]] = {}
    while arrivals := engine.arrivals(policy_version):
        for one in arrivals:
            assert one.part not in come, "a part comes once"
            come[one.part] = one.completions
    return come


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


def engine_shape(folder: Path, *, tp: int = 1, server: VllmServerConfig | None = None) -> EngineShape:
    settings = VllmConfig(kv_cache_bytes=2**25, server=VllmServerConfig() if server is None else server)
    return EngineShape(folder, "float32", tp, 128, 16, 64, settings, on_gpu=False)


def colocated(folder: Path, case: Case) -> Colocated:
    model = loaded_model(folder, build_layout(case.layout), torch.float32)
    copy = VllmModel(engine_shape(folder, tp=case.tp))
    return Colocated(model, ColocatedEngine(copy, _sync(model, copy, case), model.architecture, _sampling(case)))


def served(folder: Path, case: Case, server: VllmServerConfig, run: Path) -> Served:
    """Servers write their logs into `run`."""
    use_plugin()
    replace_nccl()
    model = loaded_model(folder, build_layout(case.layout), torch.float32)
    shape = engine_shape(folder, tp=case.tp, server=server)
    transport = weight_transport(shape, run, tell_nobody)
    servers = VllmServers(shape, _sampling(case), transport, log_folder=run)
    sync = _sync(model, servers, case)
    return Served(model, ServerEngine(servers, sync, model.architecture, max_restarts=server.max_retries), servers)


def _sampling(case: Case) -> Sampling:
    return Sampling(case.temperature, case.top_p, case.num_ids, VOCAB_SIZE, MAX_COMPLETION_TOKENS, StopAtIds())


def _sync(model: LanguageModel, receiver: Receiver, case: Case) -> WeightSync:
    def trainer(ids: Tensor) -> Tensor:
        return ask(model, [SpannedSequence(ids, (Span(1, len(ids)),))], 1.0)[0]

    return WeightSync(model, receiver, trainer_logprobs=trainer, num_token_ids=case.num_ids, max_probe_gap=1e-3)


def ask(model: LanguageModel, sequences: Sequence[SpannedSequence], temperature: float) -> tuple[Tensor, ...]:
    engine = LogprobEngine(
        model, temperature=temperature, scoring=ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=512)
    )
    return engine.logprobs(sequences).values


def train_a_little(model: torch.nn.Module, factor: float = 1.05) -> None:
    """A change that is the same for every shard and every copy of a weight, and large enough to be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


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


def token_ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [one.token_ids.tolist() for one in completions]


def running() -> list[int]:
    """Ids of all processes beneath this one: guards, servers, engine cores, workers."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def assert_nothing_runs(folder: Path, pids: Collection[int] = ()) -> None:
    """Of these processes none runs any more, and none that names the folder, some seconds after their trainer ended."""
    deadline = time.monotonic() + 30.0
    while left := [process for process in psutil.process_iter() if process.pid in pids or _names(process, folder)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def _names(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False
