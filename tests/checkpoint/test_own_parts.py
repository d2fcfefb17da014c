"""`checkpoint.reshardable: tp_pp`: nothing is gathered, the number of replicas may change, tp and pp may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_rlt.checkpoint.folders import check_newest_layout, find_resumable
from megatron_rlt.checkpoint.manifest import SavedLayout
from megatron_rlt.checkpoint.own_parts import own_parts
from tests.checkpoint.tiny_training import Training, layout_of, tiny_training
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny_hf_model(folder / "hf", "qwen3", tied=False, num_layers=2)


def _save(model: Path, folder: Path) -> tuple[int, int, float]:
    training = tiny_training(model, layout_of(1, 1, 1))
    for _ in range(3):
        training.update()
    training.save(folder, reshardable="tp_pp")
    (part,) = training.policy.optimizer.chained_optimizers
    parts = [tensor for state in own_parts(part, training.policy.model).values() for tensor in state.values()]
    return sum(_numel(one) for one in parts), sum(_is_the_optimizers(one, training) for one in parts), training.update()


def _numel(tensor: ShardedTensor) -> int:
    return int(tensor.data.numel())


def _is_the_optimizers(tensor: ShardedTensor, training: Training) -> bool:
    (part,) = training.policy.optimizer.chained_optimizers
    own = [weight for group in part.optimizer.param_groups for weight in group["params"]]
    own += [value for weight in own for value in part.optimizer.state[weight].values()]
    return tensor.data.untyped_storage().data_ptr() in {value.untyped_storage().data_ptr() for value in own}


def _go_on(model: Path, folder: Path) -> tuple[float, list[torch.Tensor]]:
    training = tiny_training(model, layout_of(1, 1, 1))
    info = find_resumable(folder, group=None)
    assert info is not None
    training.load(info)
    bits = training.state_bits()
    return training.update(), bits


def test_two_replicas_save_a_half_each_and_one_resumes(model: Path, tmp_path: Path) -> None:
    """On disk is what a gathering save of the same state writes: one replica reads all of it, bit for bit."""
    saved = run_ranks(_save, 2, model, tmp_path / "parts")
    num_weights = sum(weight.numel() for weight in run_ranks(_weights, 1, model)[0])
    assert sum(numel for numel, _, _ in saved) == 3 * num_weights
    assert all(0.4 < numel / (3 * num_weights) < 0.6 for numel, _, _ in saved)
    assert all(own > 0 and own == saved[rank][1] for rank, (_, own, _) in enumerate(saved))
    ((loss, _),) = run_ranks(_go_on, 1, model, tmp_path / "parts")
    assert loss == pytest.approx(saved[0][2], abs=1e-5)


def _weights(model: Path) -> list[torch.Tensor]:
    return [weight.detach() for weight in tiny_training(model, layout_of(1, 1, 1)).policy.model.parameters()]


def _save_in_tp2(model: Path, folder: Path) -> None:
    training = tiny_training(model, layout_of(2, 1, 1))
    training.update()
    training.save(folder, reshardable="tp_pp")


def _load_in_pp2(model: Path, folder: Path) -> str:
    training = tiny_training(model, layout_of(1, 2, 1))
    info = find_resumable(folder, group=None)
    assert info is not None
    before = training.state_bits()
    try:
        training.load(info)
    except ValueError as error:
        assert all(torch.equal(old, new) for old, new in zip(before, training.state_bits(), strict=True))
        return str(error)
    return "nothing was refused"


def test_another_tp_or_pp_is_refused_in_one_line_that_names_both_layouts(model: Path, tmp_path: Path) -> None:
    run_ranks(_save_in_tp2, 2, model, tmp_path)
    lines = run_ranks(_load_in_pp2, 2, model, tmp_path)
    with pytest.raises(ValueError, match="step-000001") as early:  # before models load
        check_newest_layout(tmp_path, SavedLayout(tp=1, pp=2, dp=1, sp=False, cp=1))
    for line in (*lines, str(early.value)):
        assert re.search(r"layout tp=2 pp=1 dp=1 cp=1, .* not in tp=1 pp=2 dp=1 cp=1: .*reshardable=full", line), line
        assert "\n" not in line
    check_newest_layout(tmp_path, SavedLayout(tp=2, pp=1, dp=3, sp=True, cp=1))
    (tmp_path / "step-000001" / "manifest.json").write_text("{")
    check_newest_layout(tmp_path, SavedLayout(tp=1, pp=2, dp=1, sp=False, cp=1))  # damage is named later, with a remedy
