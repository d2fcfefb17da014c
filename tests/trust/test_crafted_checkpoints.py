"""A checkpoint is data: whatever somebody puts into a file of it, and seals with a fitting manifest, is not run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_rlt.checkpoint.folders import find_resumable
from megatron_rlt.checkpoint.weights import load_trained_weights
from tests.checkpoint.sealing import reseal
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.trust.payload import Call, Payload

STEP = "step-000001"


def _train(model: Path, folder: Path) -> None:
    training = tiny_training(model, layout_of(1, 1, 1))
    training.update()
    training.save(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and the folder of its run's one checkpoint."""
    folder = tmp_path_factory.mktemp("crafted")
    model = tiny_hf_model(folder / "hf", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2)
    run_ranks(_train, 1, model, folder / "checkpoints")
    return model, folder / "checkpoints"


def _pickle_in(name: str) -> Callable[[Path, Payload], None]:
    def craft(step: Path, payload: Payload) -> None:
        (step / name).write_bytes(payload.pickled)

    return craft


def _saved_in(name: str) -> Callable[[Path, Payload], None]:
    def craft(step: Path, payload: Payload) -> None:
        (step / name).write_bytes(payload.saved_by_torch)

    return craft


def _call_in_metadata(step: Path, payload: Payload) -> None:
    """Everything as it was, and a call beside it."""
    file = step / "models" / "policy" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Call(str(payload.marker))
    file.write_bytes(pickle.dumps(metadata))


def _extra_state(step: Path, payload: Payload) -> None:
    """An object where Transformer Engine keeps one, as earlier versions saved it."""
    file = step / "models" / "policy" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    place = next(iter(metadata.storage_data.values()))
    tensors, content = file.with_name(place.relative_path), payload.saved_by_torch
    key = "decoder.layers.self_attention.linear_proj._extra_state/shard_0_1"
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = type(place)(place.relative_path, tensors.stat().st_size, len(content))
    with tensors.open("ab") as stream:
        stream.write(content)
    file.write_bytes(pickle.dumps(metadata))


def _tensor_elsewhere(step: Path, payload: Payload) -> None:
    file = step / "models" / "policy" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../../outside.distcp"
    file.write_bytes(pickle.dumps(metadata))


def _pickled_tensor(step: Path, payload: Payload) -> None:
    """In the place of a tensor, something else that torch saved."""
    file = step / "models" / "policy" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    place = next(iter(metadata.storage_data.values()))
    tensors, content = file.with_name(place.relative_path), payload.saved_by_torch
    place.offset, place.length = tensors.stat().st_size, len(content)
    with tensors.open("ab") as stream:
        stream.write(content)
    file.write_bytes(pickle.dumps(metadata))


CRAFTED = {
    "metadata": _pickle_in("models/policy/.metadata"),
    "metadata with a call": _call_in_metadata,
    "metadata of the optimizer": _pickle_in("optimizer/.metadata"),
    "object state": _extra_state,
    "tensor outside": _tensor_elsewhere,
    "tensor that is none": _pickled_tensor,
    "common state": _saved_in("models/policy/common.pt"),
    "common state of the optimizer": _pickle_in("optimizer/common.pt"),
    "rank state": _saved_in("ranks/rank-00000.pt"),
    "shared state": _pickle_in("shared.json"),
}


def _refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _open(model: Path, folder: Path, *, all_of_it: bool) -> str:
    training = tiny_training(model, layout_of(1, 1, 1))
    if not all_of_it:
        return _refusal(lambda: load_trained_weights(training.policy.model, folder / STEP))
    info = find_resumable(folder, group=dist.group.WORLD)
    assert info is not None
    return _refusal(lambda: training.load(info))


def _open_fully(model: Path, folder: Path) -> str:
    return _open(model, folder, all_of_it=True)


def _open_weights(model: Path, folder: Path) -> str:
    return _open(model, folder, all_of_it=False)


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_checkpoint_is_refused_in_one_line_and_not_run(
    made: tuple[Path, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = made
    folder, payload = tmp_path / "checkpoints", Payload(tmp_path / "marker")
    shutil.copytree(source, folder)
    CRAFTED[name](folder / STEP, payload)
    reseal(folder / STEP)
    openers = [_open_fully] + [_open_weights] * (name.startswith(("metadata", "object", "tensor", "common")))
    for opener in openers if "optimizer" not in name else openers[:1]:
        (refused,) = run_ranks(opener, 1, model, folder)
        assert str(folder / STEP) in refused
        assert "\n" not in refused
    assert not payload.has_run


def test_the_payload_runs_where_it_is_believed(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "marker")
    pickle.loads(payload.pickled)
    assert payload.has_run
    payload.marker.rmdir()
    (tmp_path / "x.pt").write_bytes(payload.saved_by_torch)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert payload.has_run


def test_no_object_is_saved(made: tuple[Path, Path]) -> None:
    for file in made[1].rglob(".metadata"):
        kinds = {type(stored).__name__ for stored in pickle.loads(file.read_bytes()).state_dict_metadata.values()}
        assert kinds == {"TensorStorageMetadata"}
