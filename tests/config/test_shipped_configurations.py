"""Every configuration that the project ships passes a dry run with models of its size and is named after its layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlt.cli import main
from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.job import CommandConfig, JobConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.models import LayoutConfig, Shapes
from tests.config.model_folders import model_folder

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(file for file in FOLDER.rglob("*.yaml") if file.parent.name != "pipelines")  # tests/cluster loads those
# The command of a file by the first word of its name, where that is not the command.
COMMAND_NAMES = {"rlt": "train", "scorer": "sft", "student": "sft", "warmup": "sft"}
JOBS = [file for file in FILES if file.stem.split("_")[0] != "prepare"]
PAPERS = [file for file in JOBS if "qwen" in file.stem]

# As published: config.json of Qwen2.5-7B-Instruct and Qwen2.5-32B-Instruct.
QWEN: dict[str, Any] = {"vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6}
QWEN_7B = QWEN | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_32B = QWEN | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
NUM_ROWS = 1600


def test_there_are_configurations() -> None:
    assert len(FILES) >= 15
    assert len(PAPERS) >= 7


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder for relative paths, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_a_shipped_configuration_reads(file: Path) -> None:
    load_config(_class_of(file), file, [])


@pytest.mark.parametrize("file", JOBS, ids=lambda file: str(file.relative_to(FOLDER)))
def test_a_shipped_job_passes_a_dry_run(file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _lay_out(file)
    # The hub's sets need a package that not every installation has, and network to be read.
    overrides = ["data=questions.jsonl", "kind=math"] if _command_of(file) == "evaluate" and file in PAPERS else []

    status = main([_command_of(file), str(file), *overrides, "--dry-run"])

    output = capsys.readouterr()
    assert status == 0, output.err
    config = load_config(_class_of(file), file, overrides)
    assert isinstance(config, JobConfig)
    for model in config.models.values():
        layout, replicas = model.layout, config.world_size // (model.layout.tp * model.layout.pp)
        words = f"tp {layout.tp} x pp {layout.pp} x dp {replicas}{', sp' if layout.sp else ''}"
        words += "" if model.fp8 is None else f", fp8 {model.fp8.recipe}"
        assert words in output.out


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_recipe_is_named_after_its_machines_and_layouts_and_fits_80_gb(file: Path, here: Path) -> None:
    _lay_out(file)
    config = load_config(_class_of(file), file, [])
    assert isinstance(config, JobConfig)
    models = config.models
    size, student, nodes, ranks, layouts = re.findall(
        r"qwen2.5-(\d+b)(?:_student-(\d+b))?_(\d+)x(\d+)_(\w+)", file.stem
    )[0]
    assert config.world_size == int(nodes) * int(ranks)
    for name, model in models.items():
        its_size = (student or size) if name == "student" else size
        assert _size_of(model.model) == (QWEN_32B if its_size == "32b" else QWEN_7B)
    first = next(iter(models.values())).layout
    assert layouts.startswith(_spelling(first, config.world_size)), "a second layout follows the first"
    assert ("fp8" in layouts) == any(model.fp8 is not None for model in models.values())
    assert (
        sum(model.total_bytes for model in config.plan(_shapes(config)).models) < 70e9
    )  # activations and caches want room too


def test_the_papers_distillation_takes_three_epochs_of_batches_of_96(here: Path) -> None:
    """50 steps of 96 rows pass 1,600 rows three times; a tenth of them warms up."""
    for file in (file for file in PAPERS if "distill" in file.stem):
        _lay_out(file)
        config = load_config(SftConfig, file, [])
        numbers = dict(config.plan(_shapes(config)).numbers)
        assert (numbers["optimizer steps"], numbers["warm-up steps"]) == (50, 5)
        assert numbers["tokens per step, at most"] == 96 * 16384
        assert (config.optimizer.lr, config.optimizer.schedule) == (1e-5, "cosine")
        assert (config.model.dtype, config.role) == ("bfloat16", "student")


def test_the_large_students_memory_is_what_its_file_says(here: Path) -> None:
    """In GiB by plan: 31.0 of the teacher, 16.0 of the student, 30.5 without FP8."""
    (file,) = (file for file in PAPERS if "student-32b" in file.stem)
    _lay_out(file)
    fullest = []
    for overrides in ([], ["student.fp8=null"]):
        config = load_config(_class_of(file), file, overrides)
        assert isinstance(config, JobConfig)
        fullest += [f"{model.total_bytes / 2**30:.1f} GiB" for model in config.plan(_shapes(config)).models]
    assert fullest == ["31.0 GiB", "16.0 GiB", "31.0 GiB", "30.5 GiB"]
    assert all(size in file.read_text() for size in fullest)


def _lay_out(file: Path) -> None:
    """Put what a configuration names where it looks for it."""
    for name, path in _paths(yaml.safe_load(file.read_text())):
        if name == "model" and not path.exists():
            model_folder(path, **_size_of(path))
        elif name in ("path", "data") and path.suffix == ".jsonl":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n" * NUM_ROWS)
        elif name == "input":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif name in ("path", "data") and path.parts[0] in ("data", "runs"):
            (path / "shard.tar").parent.mkdir(parents=True, exist_ok=True)
            (path / "shard.tar").touch()
    Path("questions.jsonl").write_text("{}\n" * NUM_ROWS)


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value)
        elif isinstance(value, str):
            yield name, Path(value)


def _size_of(folder: Path) -> dict[str, Any]:
    """Keys of `config.json` by a folder's name; the demo's models are as small as the folders' default."""
    name = str(folder).lower()
    return QWEN_32B if "32b" in name else QWEN_7B if "7b" in name else {}


def _spelling(layout: LayoutConfig, world_size: int) -> str:
    """`tp8sp_pp2` of a layout; `dp8` of one that splits nothing."""
    if layout == LayoutConfig():
        return f"dp{world_size}"
    return f"tp{layout.tp}{'sp' if layout.sp else ''}" + (f"_pp{layout.pp}" if layout.pp > 1 else "")


def _shapes(config: JobConfig) -> Shapes:
    return {name: Architecture.from_folder(model.model) for name, model in config.models.items()}


def _command_of(file: Path) -> str:
    word = file.stem.split("_")[0]
    return COMMAND_NAMES.get(word, word)


def _class_of(file: Path) -> type[CommandConfig]:
    return COMMANDS[_command_of(file)].config_class
