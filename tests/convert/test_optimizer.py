"""Adam's state goes from a checkpoint here, or Megatron's own save, to Megatron's own load without changing a bit."""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rlt.checkpoint.sharded import _allocate_moments, _parts, _restore
from megatron_rlt.cli import main
from tests.checkpoint.tiny_training import Training, layout_of, tiny_training
from tests.convert.conversions import converted, megatron_arguments
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_ITERATION = "iter_0000002"


def _megatron_state(training: Training, *, is_loading: bool) -> dict[str, Any]:
    """As Megatron-LM builds it, for saving and for loading."""
    state: dict[str, Any] = training.policy.model.sharded_state_dict(metadata=dict(_CONTENT))
    state["optimizer"] = training.policy.optimizer.sharded_state_dict(
        state, is_loading=is_loading, metadata=dict(_CONTENT)
    )
    return state


def _train_and_save(model: Path, root: Path) -> list[torch.Tensor]:
    # Megatron's writer calls CUDA and starts workers, which a rank of the tests may not without these two lines.
    torch.cuda.synchronize = lambda *_: None
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    training = tiny_training(model, layout_of(1, 2, 1))
    for _ in range(2):
        training.update()
    training.save(root / "run")
    training.save(root / "parts", reshardable="tp_pp")
    folder = root / "mlm" / _ITERATION
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with training.policy.model.layout:
        state = _megatron_state(training, is_loading=False)
        arguments = megatron_arguments(num_layers=2, add_qkv_bias=True, padded_vocab_size=131)
        state |= {"args": argparse.Namespace(**arguments), "iteration": 2}
        state["opt_param_scheduler"] = training.policy.scheduler.state_dict()
        dist_checkpointing.save(state, str(folder), content_metadata=dict(_CONTENT))
    dist.barrier()
    return training.state_bits()


def _load_all(model: Path, folders: list[Path]) -> list[list[torch.Tensor]]:
    """The bits of fresh trainings after Megatron's own load."""
    bits = []
    for folder in folders:
        training = tiny_training(model, layout_of(1, 2, 1))
        _allocate_moments(training.policy.optimizer)
        for weight in training.policy.model.parameters():
            weight.data.fill_(7.0)
        with training.policy.model.layout:
            loaded = dist_checkpointing.load(_megatron_state(training, is_loading=True), str(folder))
        (part,) = _parts(training.policy.optimizer)
        _restore(part, loaded.pop("optimizer"), "full")
        training.policy.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        training.policy.model.load_state_dict(loaded, strict=False)
        bits.append(training.state_bits())
    return bits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[torch.Tensor]]]:
    """`hf`, `run/step-000002` and `mlm` of one training in PP2, and every rank's bits."""
    root = tmp_path_factory.mktemp("trained")
    model = tiny_hf_model(root / "hf", "qwen2", tied=False, num_layers=2)
    return root, run_ranks(_train_and_save, 2, model, root)


def test_moments_and_main_weights_arrive_bit_by_bit(
    tmp_path: Path, trained: tuple[Path, list[list[torch.Tensor]]]
) -> None:
    root, expected = trained
    known = ("--optimizer", "--config", str(root / "hf"), "--certify", "none")
    ours = converted(root / "run" / "step-000002", tmp_path / "ours", "--to", "megatron", *known)
    theirs = converted(root / "mlm", tmp_path / "theirs", "--to", "bridge", *known)
    again = converted(theirs, tmp_path / "again", "--to", "megatron", *known, "--max-shard-bytes", "100000")
    folders = [folder / _ITERATION for folder in (root / "mlm", ours, theirs, again)]
    by_rank = run_ranks(_load_all, 2, root / "hf", folders)
    for bits_of_folders, bits in zip(by_rank, expected, strict=True):
        for folder, found in zip(folders, bits_of_folders, strict=True):
            same = [torch.equal(left, right) for left, right in zip(found, bits, strict=True)]
            assert all(same), f"{folder}: {same}"


def _without_moment(folder: Path) -> None:
    file = folder / _ITERATION / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    del metadata.state_dict_metadata["optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"]
    file.write_bytes(pickle.dumps(metadata))


def _in_another_form(folder: Path) -> None:
    file = folder / _ITERATION / "common.pt"
    common = torch.load(file, weights_only=False)
    common["optimizer"]["param_state_sharding_type"] = "dp_reshardable"
    torch.save(common, file)


def _without_optimizer(folder: Path) -> None:
    file = folder / _ITERATION / "common.pt"
    common = torch.load(file, weights_only=False)
    del common["optimizer"]
    torch.save(common, file)


@pytest.mark.parametrize(
    ("damage", "kind", "line"),
    [
        (lambda folder: None, "hf", "--optimizer: hf folders get weights alone; use --to megatron or --to bridge"),
        (_without_optimizer, "bridge", "holds no optimizer state (it was saved without); leave --optimizer out"),
        (
            _in_another_form,
            "bridge",
            "optimizer state in the form 'dp_reshardable', which depends on the save's layout",
        ),
        (_without_moment, "bridge", "optimizer state 'exp_avg_sq'"),
    ],
)
def test_state_that_cannot_be_taken_along_is_one_line(
    tmp_path: Path,
    trained: tuple[Path, list[list[torch.Tensor]]],
    damage: Callable[[Path], None],
    kind: str,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _ = trained
    source = shutil.copytree(root / "mlm", tmp_path / "source")
    damage(source)
    options = ["--to", kind, "--optimizer", "--tokenizer", "none", "--certify", "none"]
    assert main(["convert", str(source), str(tmp_path / "target"), *options]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_state_in_the_parts_of_a_layout_is_refused_and_its_weights_are_not(
    tmp_path: Path, trained: tuple[Path, list[list[torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = trained
    source, options = root / "parts" / "step-000002", ["--config", str(root / "hf"), "--certify", "none"]
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "megatron", "--optimizer", *options]) == 2
    assert "was saved with checkpoint.reshardable=tp_pp" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "weights"), "--to", "megatron", *options]) == 0


def test_inspect_says_that_a_runs_checkpoint_can_become_a_folder_of_megatron_lm(
    trained: tuple[Path, list[list[torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = trained
    assert main(["inspect", str(root / "run" / "step-000002"), "--config", str(root / "hf")]) == 0
    assert "--to hf, --to megatron, --to nemo, --to bridge" in capsys.readouterr().out
    assert main(["inspect", str(root / "mlm"), "--config", str(root / "hf")]) == 0
    assert "--to hf, --to nemo, --to bridge" in capsys.readouterr().out
