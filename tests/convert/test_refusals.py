"""A damaged or strange source gets one line that names what and where, exit status 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from megatron_rlt.cli import main
from megatron_rlt.convert.whole_folder import whole_folder
from tests.convert.conversions import converted
from tests.convert.damaged_sources import BRIDGE, CASES, ITERATION
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.tiny_models import tiny_hf_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, of the same untied model."""
    root = tmp_path_factory.mktemp("good")
    hf = tiny_hf_model(root / "hf", "llama", tied=False, num_layers=2)
    for kind in ("megatron", "nemo", "bridge"):
        converted(hf, root / kind, "--to", kind, "--certify", "none")
        for config in (root / kind).rglob("config.json"):
            config.unlink()
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_source_gets_its_line(
    tmp_path: Path, good: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    source = tmp_path / "source"
    shutil.copytree(good / case.kind, source)
    case.damage(source)
    to = () if "--to" in case.options else ("--to", "megatron" if case.kind == "hf" else "hf")
    options = [*to, *case.options, "--tokenizer", "none", "--certify", "none"]
    assert main(["convert", str(source), str(tmp_path / "target"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("megatron-rlt: error: ") == 1
    assert case.line in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing written, nothing run


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 25


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "bridge", tmp_path / "source")
    (tmp_path / "source" / BRIDGE / ".metadata").chmod(0)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--tokenizer", "none"]) == 2
    assert ".metadata: no permission to read it" in capsys.readouterr().err


def test_targets_and_options_are_checked_all_at_once(
    tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert main(["convert", str(good / "hf"), str(tmp_path / "there")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in lines] == ["target", "--to", "--tokenizer"]
    checkpoint = tmp_path / "checkpoints" / "step-000003"
    assert main(["convert", str(good / "bridge"), str(checkpoint), "--to", "megatron", "--tokenizer", "none"]) == 2
    assert "target: step-000003 is the name of a run's checkpoint" in capsys.readouterr().err
    for place in ("nowhere", "there"):
        options = ["--to", "nemo", "--tokenizer", str(tmp_path / place)]
        assert main(["convert", str(good / "hf"), str(tmp_path / "new"), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--tokenizer: {tmp_path / place} holds no tokenizer (tokenizer.json, " in line
    assert main(["convert", str(good / "hf"), str(tmp_path / "new"), "--to", "gguf"]) == 2
    assert "to: must be 'hf', 'megatron', 'nemo' or 'bridge', got \"gguf\"" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("nemo", lambda folder: None),
        ("megatron", lambda folder: shutil.copytree(folder / ITERATION, folder / "iter_0000003")),
        ("bridge", lambda folder: (folder / "run_config.yaml").write_text("of another time")),
        ("hf", lambda folder: (folder / "optimizer.pt").write_bytes(b"not a model's")),
    ],
)
def test_strange_but_whole_folders_are_read(tmp_path: Path, good: Path, kind: str, damage: Any) -> None:
    """Behind a link, with other iterations, with files of other times."""
    shutil.copytree(good / kind, tmp_path / "copy")
    damage(tmp_path / "copy")
    (tmp_path / "source").symlink_to(tmp_path / "copy")
    back = converted(tmp_path / "source", tmp_path / "back", "--to", "hf", "--certify", "none")
    assert_bit_equal(folder_tensors(back), folder_tensors(good / "hf"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def fill(value: object, file: IO[bytes] | Path) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 64:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, file)

    monkeypatch.setattr(torch, "save", fill)
    options = ["--to", "nemo", "--tokenizer", "none"]
    assert main(["convert", str(good / "hf"), str(tmp_path / "target"), *options]) == 2
    error = capsys.readouterr().err
    assert "target: cannot be written: No space left on device" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_start_go_and_an_error_of_the_program_is_no_line(tmp_path: Path) -> None:
    (tmp_path / ".target.rlt-0123abcd.tmp").mkdir()
    (tmp_path / ".target.rlt-0123abcd.tmp" / "left").touch()
    with pytest.raises(ZeroDivisionError):
        _divide_in(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def _divide_in(target: Path) -> None:
    with whole_folder(target) as folder:
        assert list(folder.iterdir()) == []
        raise ZeroDivisionError
