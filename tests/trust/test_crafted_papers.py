"""Configurations and the papers of a run folder are text: YAML makes plain values, JSON is JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.jobs.evaluate.report import _reasons
from megatron_rlt.jobs.train.rollouts import groups_from_bytes
from megatron_rlt.metrics.writer import METRICS_FILE, read_metrics
from megatron_rlt.store.run_folder import CONFIG_FILE, RUN_FILE, check_run_folder, write_run_folder
from megatron_rlt.store.worst_completions import WORST_FILE, read_worst_completions
from tests.store.test_parts import store
from tests.trust.payload import Payload


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "marker")


def _one_line(caught: pytest.ExceptionInfo[ValueError], *words: object) -> None:
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def test_a_tag_in_a_configuration_makes_nothing(tmp_path: Path, payload: Payload) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text(f"input: {payload.yaml}\noutput_dir: out\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(PrepareConfig, file, [])
    file.write_text("input: [a.jsonl]\noutput_dir: out\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(PrepareConfig, file, [f"input={payload.yaml}"])
    file.write_bytes(payload.pickled)
    with pytest.raises(ValueError, match=r"prepare\.yaml"):
        load_config(PrepareConfig, file, [])
    assert not payload.has_run


@pytest.mark.parametrize("name", [CONFIG_FILE, RUN_FILE])
@pytest.mark.parametrize("content", ["payload", "tag", "empty", "half", "list"])
def test_damaged_papers_of_a_run_are_one_line(tmp_path: Path, payload: Payload, name: str, content: str) -> None:
    config = SftConfig.model_validate({"output_dir": "a", "model": {"model": "m"}, "data": {"path": "d"}})
    write_run_folder(tmp_path, "sft", config, world_size=1)
    whole = (tmp_path / name).read_bytes()
    contents: dict[str, bytes] = {
        "payload": payload.pickled,
        "tag": payload.yaml.encode(),
        "empty": b"",
        "half": whole[: len(whole) // 2] + b"\n\0{",
        "list": b"[1]",
    }
    (tmp_path / name).write_bytes(contents[content])
    with pytest.raises(ValueError, match="the run folder is damaged") as caught:
        check_run_folder(tmp_path, "sft", config)
    _one_line(caught, tmp_path / name)
    assert not payload.has_run


@pytest.mark.parametrize(
    ("papers", "key"), [('{"command": 3, "starts": []}', "command"), ('{"command": "sft", "starts": {}}', "starts")]
)
def test_wrong_types_in_run_json_are_one_line(tmp_path: Path, papers: str, key: str) -> None:
    config = SftConfig.model_validate({"output_dir": "a", "model": {"model": "m"}, "data": {"path": "d"}})
    write_run_folder(tmp_path, "sft", config, world_size=1)
    (tmp_path / RUN_FILE).write_text(papers)
    with pytest.raises(ValueError, match=f"holds no valid '{key}'"):
        check_run_folder(tmp_path, "sft", config)


@pytest.mark.parametrize(("name", "reader"), [(METRICS_FILE, read_metrics), (WORST_FILE, read_worst_completions)])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, payload: Payload, name: str, reader: Any) -> None:
    """A half-written last line is what a kill leaves; anything else is damage, such as zeros after a power failure."""
    file = tmp_path / name
    file.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    assert reader(tmp_path) == [{"step": 1, "a": 2.0}]
    for damage in (
        b"\0\0\0",
        b'{"step": 2, "a"',
        b"[2]",
        b'{"step": "2"}',
        b"\xff",
        payload.pickled.replace(b"\n", b""),
    ):
        file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
        with pytest.raises(ValueError, match="line 2 is no record of a step") as caught:
            reader(tmp_path)
        _one_line(caught, file)
    assert not payload.has_run


def test_a_damaged_identity_of_parts_is_one_line(tmp_path: Path, payload: Payload) -> None:
    store(tmp_path).begin()
    identity = tmp_path / "parts" / "identity.json"
    for content in (payload.pickled, b"", b"[]", b"{"):
        identity.write_bytes(content)
        with pytest.raises(ValueError, match=r"remove .* to do its parts again") as caught:
            store(tmp_path).is_finished()
        _one_line(caught, identity)
    assert not payload.has_run


def test_damaged_lists_of_rejected_rows_and_completions_are_one_line(tmp_path: Path, payload: Payload) -> None:
    rejected = tmp_path / "rejected.jsonl"
    for content in (payload.pickled, b"{}\n", b"[1]\n"):
        rejected.write_bytes(content)
        with pytest.raises(ValueError, match="missing or damaged") as caught:
            _reasons(rejected)
        _one_line(caught, rejected)
    for content in (payload.pickled, payload.saved_by_torch, b"x"):
        with pytest.raises(ValueError, match="sampled ahead are damaged") as caught:
            groups_from_bytes(content)
        _one_line(caught)
    assert not payload.has_run
