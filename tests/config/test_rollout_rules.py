"""Rules of `rollout` with vLLM, whether or not it is installed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config import rollout as rollout_rules
from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.mismatch import MismatchConfig
from megatron_rlt.config.models import LayoutConfig, ModelConfig
from megatron_rlt.config.rollout import RolloutConfig, ahead_faults, engine_faults, rollout_faults
from tests.tiny_models import tiny_hf_model


@dataclass(frozen=True)
class Installed:
    """What stands where vLLM is looked for."""

    vllm: bool
    cpu_build: bool


@pytest.fixture
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Installed = getattr(request, "param", Installed(vllm=True, cpu_build=False))
    monkeypatch.setattr(rollout_rules, "find_spec", lambda _: object() if found.vllm else None)
    monkeypatch.setattr(rollout_rules, "_is_cpu_build", lambda: found.cpu_build)


def faults(folder: Path, settings: dict[str, Any], *, tp: int = 1, world_size: int = 4) -> list[str]:
    rollout = RolloutConfig.model_validate({"engine": "vllm", "vllm": settings})
    model = ModelConfig(model=folder, layout=LayoutConfig(tp=tp))
    return rollout_faults(rollout, model, Architecture.from_folder(folder), world_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_hf_model(tmp_path / "model", "qwen2", tied=False)  # 4 heads of 16


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"tp": 3}, "rollout.vllm.tp=3: must divide world_size=4; nearest valid: 2"),
        ({"tp": 8, "placement": "server"}, "rollout.vllm.tp=8: must divide attention heads 4; nearest valid: 4"),
        (
            {"server": {"max_retries": 1}},
            "rollout.vllm.server: has no effect with placement=colocated; set placement=server, or leave it out",
        ),
        (
            {"placement": "server", "sleep_level": 2},
            "rollout.vllm.sleep_level=2: has no effect with placement=server, whose devices are its own; leave it out",
        ),
        (
            {"placement": "server", "server": {"addresses": ["http://a:1"], "devices": ["1"]}},
            "rollout.vllm.server.devices: has no effect on servers at addresses, which run already; leave one of the"
            " two out",
        ),
        (
            {"placement": "server", "server": {"addresses": ["a:1"]}},
            "rollout.vllm.server.addresses: 'a:1' is no address such as http://node7:8000",
        ),
        (
            {"placement": "server", "server": {"addresses": ["http://a:1"], "api_key_file": "nowhere"}},
            "rollout.vllm.server.api_key_file: nowhere is no file; write the key into it",
        ),
        (
            {"placement": "server", "server": {"addresses": ["http://a:1"]}},
            "rollout.vllm.server.addresses: without a key whoever reaches the servers can replace their weights; name"
            " the file of their key in api_key_file, or set allow_unprotected=true",
        ),
        (
            {"placement": "server", "server": {"allow_unprotected": True}},
            "rollout.vllm.server.allow_unprotected: has no effect on servers that the job starts; leave it out, or name"
            " addresses",
        ),
        (
            {"placement": "server", "server": {"transport": "broadcast", "transfer_dir": "there"}},
            "rollout.vllm.server.transfer_dir: has no effect with transport=broadcast, which writes no files; leave it"
            " out, or set transport=files",
        ),
        (
            {"placement": "server", "server": {"bucket_bytes": 1000}},
            "rollout.vllm.server.bucket_bytes=1000: has no effect with transport=files; leave it out, or set"
            " transport=broadcast",
        ),
    ],
)
def test_a_fault_is_named_with_its_remedy(folder: Path, settings: dict[str, Any], line: str) -> None:
    assert line in faults(folder, settings)


@pytest.mark.usefixtures("installed")
def test_a_server_need_not_divide_the_ranks_and_the_policys_tp_is_the_default(folder: Path) -> None:
    assert faults(folder, {"placement": "server", "tp": 4}, world_size=2) == []
    assert faults(folder, {}, tp=2) == []
    assert faults(folder, {}, tp=2, world_size=3) != []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("installed", [Installed(vllm=False, cpu_build=False)], indirect=True)
def test_without_vllm_the_line_says_how_to_install_it(folder: Path) -> None:
    assert faults(folder, {}) == [], "the configuration itself breaks no rule: another machine may have it"
    (line,) = engine_faults(RolloutConfig(engine="vllm"))
    assert "pip install 'megatron-rlt[vllm]'" in line
    assert "make .venv-vllm/.installed" in line


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("installed", [Installed(vllm=True, cpu_build=True)], indirect=True)
def test_heads_that_the_cpu_build_does_not_know_are_refused(folder: Path) -> None:
    (line,) = faults(folder, {})
    assert "no attention for heads of 16, only of 32, 64," in line


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("installed", [Installed(vllm=True, cpu_build=True)], indirect=True)
@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_transports_between_gpus_are_refused_where_there_are_none(folder: Path, transport: str) -> None:
    line = (
        f"rollout.vllm.server.transport={transport}: moves weights between GPUs, and vLLM's CPU build has none; use"
        " transport=files"
    )
    assert line in faults(folder, {"placement": "server", "server": {"transport": transport}})


SERVED = {"engine": "vllm", "vllm": {"placement": "server"}, "ahead": 1}
CORRECTED = MismatchConfig(token_weight_cap=2.0)


@pytest.mark.parametrize(
    ("rollout", "mismatch", "lines"),
    [
        ({}, None, []),
        (SERVED, CORRECTED, []),
        (SERVED, MismatchConfig(sequence_weight_cap=2.0), []),
        (
            SERVED,
            MismatchConfig(),
            [
                "rollout.ahead=1: completions come from weights one step old, which the update must weigh; set"
                " mismatch.token_weight_cap=2 (or sequence_weight_cap)"
            ],
        ),
        (
            {"engine": "vllm", "ahead": 1},
            CORRECTED,
            [
                "rollout.ahead=1: sampling and training at the same time need devices each; set rollout.engine=vllm and"
                " rollout.vllm.placement=server, or leave ahead out"
            ],
        ),
        (SERVED, None, ["rollout.ahead=1: only a teacher's `train` samples ahead of its steps; leave it out"]),
    ],
    ids=["off", "token cap", "sequence cap", "no cap", "colocated", "another job"],
)
def test_sampling_ahead_needs_devices_of_its_own_and_a_weight(
    rollout: dict[str, Any], mismatch: MismatchConfig | None, lines: list[str]
) -> None:
    assert ahead_faults(RolloutConfig.model_validate(rollout), mismatch) == lines
