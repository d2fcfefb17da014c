"""What `megatron-rlt serve` would start on a node, and which configurations have no use for it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.folders.description import architecture_in
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs import serve
from tests.distributed.tiny_runs import RL_CONFIG, WARMUP_CONFIG
from tools.demo.make_assets import save_model

ON_SERVERS = ["rollout.engine=vllm", "rollout.vllm.placement=server"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=0)
    return folder


def _run(model: Path, config: JobConfig) -> int:
    return serve.run_serve(config, dict.fromkeys(config.models, architecture_in(model)), dry_run=True)


def _train(model: Path, *settings: str) -> TrainConfig:
    models = [f"teacher.model={model}", f"student.model={model}"]
    return load_config(TrainConfig, RL_CONFIG, [*models, *settings, "output_dir=runs/served"])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ((), "SERVER_NODES: the configuration has no vLLM servers; set rollout.engine=vllm"),
        (("rollout.engine=vllm",), "SERVER_NODES: the configuration has no vLLM servers"),
        ((*ON_SERVERS, 'rollout.vllm.server.devices=["0"]'), "leave rollout.vllm.server.addresses"),
        ((*ON_SERVERS, 'rollout.vllm.server.addresses=["http://a:1"]'), "leave rollout.vllm.server.addresses"),
        ((*ON_SERVERS, "rollout.vllm.server.transport=ipc"), "transport=ipc: needs servers on the trainer's own GPUs"),
    ],
)
def test_a_configuration_without_use_for_them_is_refused(model: Path, settings: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        _run(model, _train(model, *settings))


def test_a_command_that_does_not_sample_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="samples nothing with vLLM"):
        _run(model, load_config(SftConfig, WARMUP_CONFIG, [f"model.model={model}", "output_dir=runs/served"]))


@pytest.mark.parametrize(
    ("tp", "visible", "devices"), [(2, "4,5,6,7", ["4,5", "6,7"]), (3, "", ["0,1,2"]), (1, "7", ["7"])]
)
def test_servers_share_a_nodes_gpus(
    model: Path,
    tp: int,
    visible: str,
    devices: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This machine is told that it has as many as are visible, or four."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(serve.torch.cuda, "device_count", lambda: len(visible.split(",")) if visible else 4)
    assert _run(model, _train(model, *ON_SERVERS, f"rollout.vllm.tp={tp}")) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"CUDA_VISIBLE_DEVICES={names}" for names in devices]
    for line in lines:
        assert f"--tensor-parallel-size={tp}" in line
        assert "--middleware=megatron_rlt.rollout.vllm.require_key.RequireKey" in line


def test_a_server_needs_its_gpus_on_one_node(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"rollout\.vllm\.tp=8: \S+ has 4 GPUs, and a server lies on one node"):
        _run(model, _train(model, *ON_SERVERS, "rollout.vllm.tp=8"))
