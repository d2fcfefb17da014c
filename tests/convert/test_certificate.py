"""The certificate compares what two independent programs compute: a permuted tensor passes hashes and fails here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rlt.cli import main
from megatron_rlt.convert import targets
from megatron_rlt.jobs.convert.certificate import MAX_DIFFERENCE, fixed_prompts
from megatron_rlt.models.weights.table import Rule, WeightPair
from tests.convert.conversions import converted
from tests.oracle import dense_logprobs
from tests.tiny_models import tiny_hf_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model") / "hf", "qwen2", tied=False, num_layers=2)


def test_the_certificate_holds_files_names_hashes_and_the_log_probs_of_plain_transformers(
    tmp_path: Path, hf: Path
) -> None:
    target = converted(hf, tmp_path / "nemo", "--to", "nemo")
    certificate = json.loads((target / "conversion.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    assert certificate["tensors"].keys() == tensors.keys()
    query = certificate["tensors"]["model.layers.1.self_attn.q_proj.weight"]
    assert query["target"] == "module.decoder.layers.self_attention.linear_qkv.weight[1]"
    assert (query["source"], query["shape"], query["dtype"]) == (
        "model.layers.1.self_attn.q_proj.weight",
        [64, 64],
        "float32",
    )
    assert "model.safetensors" in certificate["source"]["files"]
    logprobs = certificate["logprobs"]
    assert logprobs["readers"] == ["transformers", "megatron-rlt"]
    assert len(logprobs["source"]) == len(logprobs["target"]) == 8
    model = AutoModelForCausalLM.from_pretrained(hf)
    for prompt, ours, theirs in zip(fixed_prompts(131), logprobs["source"], logprobs["target"], strict=True):
        expected = dense_logprobs(model, prompt, temperature=1.0).tolist()
        assert ours == pytest.approx(expected, abs=1e-5)
        assert theirs == pytest.approx(expected, abs=1e-5)
    assert 0 <= logprobs["max_difference"] < 1e-5


def test_a_rolled_qkv_fails_the_certificate_and_leaves_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rolled on writing and back on reading, as by a converter with a wrong rule: every hash is equal."""
    join, read = targets.join_pair, "megatron_rlt.models.weights.sources._MegatronChunks.parts"
    from megatron_rlt.jobs.convert import certificate
    from megatron_rlt.models.weights.sources import _MegatronChunks, split_pair

    def rolled(pair: WeightPair, *args: object) -> torch.Tensor:
        whole = join(pair, *args)  # type: ignore[arg-type]
        return whole.roll(16, 0) if pair.rule is Rule.FUSED_QKV else whole

    parts, load = _MegatronChunks.parts, certificate.load_weights

    def rolled_back(self: _MegatronChunks, pair: WeightPair) -> dict[str, torch.Tensor]:
        found = parts(self, pair)
        if pair.rule is not Rule.FUSED_QKV:
            return found
        return split_pair(pair, join(pair, found, self.architecture).roll(-16, 0), self.architecture)

    def load_as_stored(*args: object) -> None:
        with monkeypatch.context() as without:
            without.setattr(read, parts)
            load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(targets, "join_pair", rolled)
    monkeypatch.setattr(read, rolled_back)
    monkeypatch.setattr(certificate, "load_weights", load_as_stored)
    options = ["--to", "megatron", "--tokenizer", "none"]
    assert main(["convert", str(hf), str(tmp_path / "rolled"), *options]) == 1
    error = capsys.readouterr().err
    assert "not written: log-probs of the fixed prompts differ by" in error
    assert float(error.split("differ by ")[1].split(",")[0]) > 100 * MAX_DIFFERENCE
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(hf), str(tmp_path / "rolled"), *options, "--certify", "none"]) == 0


def test_a_target_that_reads_back_differently_is_not_written(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join = targets.join_pair

    def changed(pair: WeightPair, *args: object) -> torch.Tensor:
        whole = join(pair, *args)  # type: ignore[arg-type]
        return whole.nextafter(whole + 1) if pair.name.endswith("final_layernorm.weight") else whole

    monkeypatch.setattr(targets, "join_pair", changed)
    options = ["--to", "bridge", "--tokenizer", "none", "--certify", "none"]
    assert main(["convert", str(hf), str(tmp_path / "changed"), *options]) == 1
    assert "read back, model.norm.weight was float32 [64]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("certify", "imports_megatron"), [("logprobs", True), ("none", False)])
def test_a_fresh_process_warns_of_nothing_and_needs_megatron_only_to_certify(
    tmp_path: Path, hf: Path, certify: str, imports_megatron: bool
) -> None:
    program = (
        "import sys; from megatron_rlt.cli import main; status = main(sys.argv[1:]);"
        "print('megatron.core' in sys.modules); sys.exit(status)"
    )
    arguments = ["convert", hf, tmp_path / "nemo", "--to", "nemo", "--tokenizer", "none", "--certify", certify]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == str(imports_megatron)
