"""On GPUs: weights to a vLLM server by NCCL (two GPUs) and through shared memory (one), several times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.vllm.server_engine import ServerEngine
from megatron_rlt.rollout.vllm.servers import VllmServers
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.transfer.direct import weight_transport
from megatron_rlt.rollout.weight_sync.sync import WeightSync
from megatron_rlt.types import Span, SpannedSequence, tell_nobody
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.vllm.policies import (
    MAX_COMPLETION_TOKENS,
    VOCAB_SIZE,
    Case,
    StopAtIds,
    ask,
    assert_nothing_runs,
    make_requests,
    save_policy,
    train_a_little,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.gpu
VERSIONS = (3, 4, 5)
MAX_GAP = 1e-2  # of fp32 log-probs: matrix products may round to TF32


def sync_versions(folder: Path, run: Path, server: VllmServerConfig) -> list[dict[str, Any]]:
    model = loaded_model(folder, build_layout(LayoutConfig()), torch.float32)
    model.to("cuda")
    settings = VllmConfig(kv_cache_bytes=2**25, enforce_eager=True, server=server)
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, settings, on_gpu=True)
    sampling = Sampling(0.7, 1.0, VOCAB_SIZE, VOCAB_SIZE, MAX_COMPLETION_TOKENS, StopAtIds())
    servers = VllmServers(shape, sampling, weight_transport(shape, run, tell_nobody), log_folder=run)

    def trainer(ids: Tensor) -> Tensor:
        return ask(model, [SpannedSequence(ids, (Span(1, len(ids)),))], 1.0)[0]

    sync = WeightSync(model, servers, trainer_logprobs=trainer, num_token_ids=VOCAB_SIZE, max_probe_gap=MAX_GAP)
    engine, found = ServerEngine(servers, sync, model.architecture, max_restarts=0), []
    for version in VERSIONS:
        engine.generate(make_requests(), policy_version=version)
        found.append(engine.take_metrics())
        train_a_little(model)
    return found


@pytest.mark.parametrize(
    ("transport", "devices"),
    [
        pytest.param(
            "broadcast", "1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
        ),
        pytest.param("ipc", "0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_server_has_the_policys_weights_after_every_sync(
    transport: str, devices: str, tied: bool, tmp_path: Path
) -> None:
    folder = save_policy(tmp_path / "policy", Case("one rank", LayoutConfig(), "qwen3", tied=tied, tp=1))
    server = VllmServerConfig(transport=transport, bucket_bytes=2**16, devices=(devices,))  # type: ignore[arg-type]
    (found,) = run_ranks(sync_versions, 1, folder, tmp_path / "run", server)
    assert [one["weight_sync_probe_gap"] < MAX_GAP for one in found] == [True] * len(VERSIONS)
    assert_nothing_runs(tmp_path)
