"""Folders of every kind are the models of jobs: the same weights in every layout, the same run, every kind exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlt.checkpoint.sharded import save_model
from megatron_rlt.cli import main
from megatron_rlt.config.folders.description import describe_model
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.weights.load import load_weights
from megatron_rlt.parallel.layout import build_layout
from tests.convert.conversions import converted
from tests.distributed.tiny_runs import SMALL_RL, TinyInputs, tiny_inputs, train_here
from tests.models.loading import assert_bit_equal, folder_tensors, loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tools.chaos.outcome import outcome

_KINDS = ("megatron", "nemo", "bridge")
_LAYOUTS = (LayoutConfig(), LayoutConfig(pp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(tp=2, pp=2))


def _save_then_load_all(root: Path, families: dict[str, bool]) -> int:
    """A checkpoint saves in TP2 x PP2; then every folder is loaded in every layout, as the Hugging Face folder is."""
    compared = 0
    for family in families:
        hf = root / family / "hf"
        if dist.get_rank() == 0:
            (root / family / "saved").mkdir()
        dist.barrier()
        save_model(loaded_model(hf, build_layout(_LAYOUTS[-1]), torch.float32), root / family / "saved")
        for config in _LAYOUTS:
            layout = build_layout(config)
            expected = dict(loaded_model(hf, layout, torch.float32).named_parameters())
            for kind in (*_KINDS, "saved"):
                described = describe_model(root / family / kind, config=hf if kind == "saved" else None)
                model = build_model(described.architecture, layout, dtype=torch.float32, recompute="none")
                for parameter in model.parameters():
                    parameter.data.fill_(7.0)
                load_weights(model, described)
                loaded = dict(model.named_parameters())
                assert_bit_equal(
                    {name: one.detach() for name, one in loaded.items()},
                    {name: one.detach() for name, one in expected.items()},
                )
                compared += 1
    return compared


def test_every_kind_loads_into_every_layout_as_the_hugging_face_folder(tmp_path: Path) -> None:
    families = {"llama": False, "qwen2": True}
    for family, tied in families.items():
        hf = tiny_hf_model(tmp_path / family / "hf", family, tied=tied)
        for kind in _KINDS:
            converted(hf, tmp_path / family / kind, "--to", kind, "--certify", "none")
    assert run_ranks(_save_then_load_all, 4, tmp_path, families) == [2 * 4 * 4] * 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=8)


def _train_twice(root: Path, plain: list[str], nemo: list[str]) -> list[int]:
    dist.barrier()
    return [train_here(root / "plain", plain), train_here(root / "nemo_student", nemo)]


def test_a_nemo_folder_is_a_student_and_the_trained_teacher_is_exported_as_every_kind(
    tmp_path: Path, inputs: TinyInputs
) -> None:
    nemo = tmp_path / "student-nemo"
    assert main(["convert", str(inputs.model), str(nemo), "--to", "nemo"]) == 0
    plain = [*SMALL_RL, *inputs.for_train, "num_steps=1"]
    kinds = "checkpoint.export=[hf, megatron, nemo, bridge]"
    as_nemo = [*plain, f"teacher.model={nemo}", f"student.model={nemo}", kinds]
    assert run_ranks(_train_twice, 2, tmp_path, plain, as_nemo) == [[0, 0], [0, 0]]

    run = tmp_path / "nemo_student"
    expected, found = outcome(tmp_path / "plain"), outcome(run)
    assert found.metrics == expected.metrics
    assert_bit_equal(folder_tensors(run / "hf"), folder_tensors(tmp_path / "plain" / "hf"))
    config = json.loads((run / "hf" / "config.json").read_text())
    assert config == json.loads((inputs.model / "config.json").read_text())
    for kind in (*_KINDS, "checkpoints/step-000001"):
        back = converted(run / kind, tmp_path / kind.replace("/", "-"))
        assert_bit_equal(folder_tensors(back), folder_tensors(run / "hf"))
