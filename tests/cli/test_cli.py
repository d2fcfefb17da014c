"""The command as a user types it: help, dry runs, and how fast and how quietly bad input is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rlt.cli import main
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.keys import keys_of
from tests.config.conftest import workplace

__all__ = ["workplace"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_a_dry_run_prints_the_resolved_yaml_then_the_derived_numbers(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "train.yaml", "grpo.group_size=16", "--dry-run"]) == 0

    text, _, numbers = capsys.readouterr().out.partition("Derived numbers")
    resolved = TrainConfig.model_validate(yaml.safe_load(text))
    assert (resolved.grpo.group_size, resolved.grpo.questions_per_step, resolved.num_steps) == (16, 8, 10)
    lines = [" ".join(line.replace("│", " ").split()) for line in numbers.splitlines()]
    assert "completions per step 128" in lines
    assert "teacher tokens per step, at most 64,000" in lines
    assert not (workplace / "run").exists()


@pytest.mark.parametrize("command", ["rlvr", "sft", "collect", "score", "evaluate"])
def test_other_jobs_have_a_dry_run_too(workplace: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, f"{command}.yaml", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "output_dir: run" in output
    assert "tp 1 x pp 1 x dp 1" in output


def test_train_with_a_verifier_is_rlvr_and_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rlvr", "rlvr.yaml", "--dry-run"]) == 0
    own_name = capsys.readouterr()
    assert main(["train", "rlvr.yaml", "--dry-run"]) == 0
    assert capsys.readouterr() == (
        own_name.out,
        "megatron-rlt: the configuration has a `verifier` section, so this runs `megatron-rlt rlvr`\n",
    )
    assert main(["rlvr", "--help-config"]) == 0
    assert "verifier.correct" in capsys.readouterr().out


def test_help_names_every_command_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    commands = ("prepare", "sft", "train", "rlvr", "collect", "score", "reweigh", "evaluate", "parity")
    assert all(f"│ {command} " in output for command in commands)
    assert main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("CONFIG.yaml", "KEY=VALUE", "--dry-run", "--help-config"))


def test_help_config_lists_every_key_with_default_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-config"]) == 0
    output = capsys.readouterr().out
    heads = [line for line in output.splitlines() if line and not line.startswith(" ")]
    shown = {name: default for name, _, default in (line.partition(": ") for line in heads)}
    keys = keys_of(TrainConfig)
    assert list(shown) == [key.dotted for key in keys]
    text = " ".join(output.split())
    assert all(key.sentence in text for key in keys)
    assert (shown["teacher.model"], shown["reward.alpha"], shown["rollout.stop_at_end_tag"]) == (
        "required",
        "0.01",
        "true",
    )
    assert (shown["prompts.teacher_system"], shown["reward"], shown["teacher"]) == ("null", "", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "Missing argument 'CONFIG.yaml'."),
        (["trian", "x.yaml"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "train.yaml", "--dry"], "No such option: --dry (Possible options: --dry-run)"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"megatron-rlt: error: {line}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "train.yaml", "teacher.layout.tp=3"], ["sft", "sft.yaml", "--dry-run"]]
)
def test_help_faults_and_dry_runs_need_neither_torch_nor_a_second_and_a_half(
    workplace: Path, arguments: list[str]
) -> None:
    program = f"import sys; from megatron_rlt.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    # Processor seconds: the machine may be busy with other tests.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5


def test_the_module_is_the_command(workplace: Path) -> None:
    command = [sys.executable, "-m", "megatron_rlt", "train", "train.yaml", "num_step=3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))
    expected = "megatron-rlt: error: command line: num_step: unknown key; closest valid key: num_steps\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_prepare_writes_shards_that_the_other_commands_accept(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "prepare.yaml"]) == 0
    assert main(["train", "train.yaml", "data.path=shards", "--dry-run"]) == 0
    assert "Prepared: 2 rows" in capsys.readouterr().out


def test_prepare_of_rows_none_of_which_is_usable_is_the_users_fault(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text(json.dumps({"question": "1+1?"}) + "\n")
    assert main(["prepare", "prepare.yaml"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("megatron-rlt: error: ")
    assert "rows.jsonl" in errors
    assert "Traceback" not in errors
    assert not Path("shards").exists()
