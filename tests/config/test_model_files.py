"""Every file of a model folder is read under a guard, and what two files state must agree, before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.model_files import declared_stop_ids, model_faults, token_ids, vocabulary_faults
from megatron_rlt.config.models import ModelConfig
from tests.config.model_folders import QWEN2, model_folder

BROKEN = {
    "cut": b'{ "eos_token_id": ',
    "empty": b"",
    "a list": b"[1, 2]",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a number of thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nested too deep": b"[" * 100_000,
}
SIDE_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "model.safetensors.index.json",
)


def faults_of(folder: Path) -> list[str]:
    """What a command's check says about a model's folder."""
    models = {"teacher": ModelConfig(model=folder)}
    faults, shapes = model_faults(models), {}
    try:
        shapes["teacher"] = Architecture.from_folder(folder)
    except ValueError as error:
        faults.append(str(error))
    return faults + vocabulary_faults(models, shapes)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_file_that_is_no_json_object_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert faults_of(folder) == []
    (folder / name).write_bytes(content)
    (fault,) = faults_of(folder)
    assert str(folder / name) in fault
    assert "; " in fault
    assert "\n" not in fault


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"])
def test_a_link_to_a_file_that_is_not_there_is_no_file_left_out(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / ".#config.json").symlink_to("an-editor@a-machine")
    assert faults_of(folder) == []
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/0123")
    (fault,) = faults_of(folder)
    assert f"{folder / name} is a link to ../blobs/0123, which is not there; copy" in fault


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt"])
def test_a_text_file_that_is_no_utf8_or_a_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / name).write_bytes(b"caf\xe9")
    assert [str(folder / name) in fault for fault in faults_of(folder)] == [True]
    (folder / name).unlink()
    (folder / name).mkdir()
    assert [str(folder / name) in fault for fault in faults_of(folder)] == [True]


@pytest.mark.parametrize(
    "content",
    [
        {"model": None},
        {"model": {"vocab": 7}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": [1, 2]}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]},
        {"model": {"vocab": {}}, "added_tokens": ["x"]},
        {},
    ],
)
def test_a_tokenizer_laid_out_otherwise_is_named(content: Any, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (fault,) = faults_of(folder)
    assert str(folder / "tokenizer.json") in fault


@pytest.mark.parametrize("declared", ["</s>", [1, "2"], [[1]], {"a": 1}, True, -1, 1.5])
def test_stop_ids_that_are_no_ids_are_named(declared: object, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    (fault,) = faults_of(folder)
    assert "generation_config.json: eos_token_id must be token ids" in fault


@pytest.mark.parametrize(("declared", "expected"), [(None, set()), (7, {7}), ([7, 8], {7, 8}), ([], set())])
def test_stop_ids_are_one_several_or_none(declared: object, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert declared_stop_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "num_ids"),
    [
        ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 101}}}}, 102),
        (
            {"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 5}, "added_tokens": [{"id": 101, "content": "x"}]}},
            102,
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"150": {"content": "<new>"}}}}, 151),
    ],
)
def test_an_id_without_a_row_of_the_embedding_is_refused(files: dict[str, Any], num_ids: int, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert faults_of(folder) == [
        f"teacher.model: has a vocabulary of 101 and cannot read the tokenizer's {num_ids} ids; take the model and the"
        " tokenizer that belong together"
    ]


def test_the_last_row_of_the_embedding_may_have_a_token(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", vocabulary={"a": 0, "b": 100})
    assert faults_of(folder) == []
    assert max(token_ids(folder).values()) == QWEN2["vocab_size"] - 1


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    (fault,) = faults_of(folder)
    assert "holds an adapter (adapter_config.json)" in fault


def write_index(folder: Path, *files: str) -> None:
    index = {"weight_map": {f"tensor{number}": file for number, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_two_sets_of_weights_are_refused_with_both_names(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    write_index(folder, "model.safetensors", "model-00002-of-00002.safetensors")
    (fault,) = faults_of(folder)
    assert "holds model.safetensors and model.safetensors.index.json" in fault
    write_index(folder, "model.safetensors")  # an index of the single file says the same
    assert faults_of(folder) == []


def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", without=("model.safetensors",))
    (folder / "model-1.safetensors").write_text("")
    write_index(folder, "../other/model-1.safetensors")
    (fault,) = faults_of(folder)
    assert "outside the folder" in fault


def read(folder: Path, **changes: Any) -> Architecture:
    return Architecture.from_folder(model_folder(folder, **changes))


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LINEAR},
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        # transformers would take the base 10000 that rope_scaling and the top do not state
        {"rope_theta": None, "rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": LINEAR},
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    ],
)
def test_two_kinds_of_rope_are_refused_with_both_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling state two kinds of RoPE"):
        read(tmp_path / "model", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": None},
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": {}},
        {"rope_parameters": None, "rope_scaling": {**LINEAR, "type": "yarn"}},
    ],
)
def test_one_kind_of_rope_in_two_spellings_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    shape = read(tmp_path / "model", **changes)
    assert (shape.rope_theta, shape.rope_scaling) == (1e4, LINEAR)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 128},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling states a factor and no rope_type"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "rope_parameters states a factor and no rope_type"),
    ],
)
def test_a_fact_that_transformers_would_read_elsewhere_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        read(tmp_path / "model", **changes)


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 1.5, 10**400, float("nan"), float("inf"), "", "7", [], [1, 2], [[]], {}, {"a": {}}),
    *({"rope_type": []}, {"type": "yarn", "factor": "2"}, {"type": "llama3", "factor": 0}, {"rope_theta": "x"}),
    *({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}, {"rope_theta": 10**400}),
)


def test_any_value_under_any_key_is_read_or_refused_with_file_and_key(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    source = folder / "config.json"
    optional = ("hidden_act", "head_dim", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    rope = ("rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
    others = ("attention_bias", "mlp_bias", "quantization_config", "model_type", "transformers_weights")
    settings = ({}, {"use_sliding_window": True, "sliding_window": 128}, {"architectures": ["LlamaForCausalLM"]})
    refused = []
    for base in settings:
        for key in (*QWEN2, *optional, *rope, *others):
            for value in ODD:
                source.write_text(json.dumps(QWEN2 | base | {key: value}))
                try:
                    Architecture.from_folder(folder)
                except ValueError as error:
                    refused.append(str(error))
    assert len(refused) > 500
    assert all(fault.startswith(f"{source}: ") and "; " in fault for fault in refused)
    assert all(len(fault.splitlines()) == 1 for fault in refused)
