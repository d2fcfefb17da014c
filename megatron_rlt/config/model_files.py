"""Rules about the files of a model folder, checked before torch is imported: weights, tokenizer, generation settings.

`prompts/tokenizer.py` reads the same files through transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlt.config.folders.description import is_hugging_face, tokenizer_in
from megatron_rlt.config.folders.kind import TOKENIZER_FILES
from megatron_rlt.config.hf_config import is_finite_number, shown, stop_ids
from megatron_rlt.config.models import ModelConfig, Shapes
from megatron_rlt.config.remote_code import remote_code_faults
from megatron_rlt.config.weight_files import weight_index
from megatron_rlt.given_files import read_json_object, read_text

_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXTS = ("merges.txt", "chat_template.jinja")
_AGAIN = "download or copy the file again"


def model_faults(models: Mapping[str, ModelConfig]) -> list[str]:
    """One line per missing folder or file, and per file that cannot be read."""
    return [f"{name}.model: {fault}" for name, model in models.items() for fault in _folder_faults(model.model)]


def vocabulary_faults(models: Mapping[str, ModelConfig], shapes: Shapes) -> list[str]:
    """Models without a row of the embedding for every id that the files beside them name."""
    faults = []
    for name in models.keys() & shapes.keys():
        try:
            num_ids = max(token_ids(tokenizer_in(models[name].model)).values(), default=-1) + 1
            last_stop = max(declared_stop_ids(models[name].model), default=-1)
        except ValueError:  # `model_faults` names the file
            continue
        fault = vocabulary_fault(shapes[name].vocab_size, num_ids)
        if fault is not None:
            faults.append(f"{name}.model: {fault}")
        if last_stop >= shapes[name].vocab_size:
            faults.append(
                f"{name}.model: {models[name].model / 'generation_config.json'}: eos_token_id {last_stop} must be below"
                f" vocab_size {shapes[name].vocab_size}; correct the file"
            )
    return sorted(faults)


def vocabulary_fault(vocab_size: int, num_ids: int) -> str | None:
    """What is wrong where a tokenizer has more ids than the embedding has rows; the embedding may be padded."""
    if num_ids <= vocab_size:
        return None
    return (
        f"has a vocabulary of {vocab_size} and cannot read the tokenizer's {num_ids} ids; take the model and the"
        " tokenizer that belong together"
    )


def token_ids(folder: Path) -> dict[str, int]:
    """Ids of all tokens, added ones included, by `tokenizer.json` and `tokenizer_config.json`; empty without the first.

    Raises ValueError for a file that cannot be read or is no tokenizer.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    return _read_ids(file, _vocabulary) | (_read_ids(settings, _added) if settings.is_file() else {})


def declared_stop_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, one id or several; empty without the file or the key.

    Raises ValueError for a file that cannot be read, and for anything else under the key.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return frozenset()
    return stop_ids(file, read_json_object(file))


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The keys of tokenizer_config.json. Raises ValueError for a file that cannot be read, or a length that is none."""
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file)
    longest = settings.get("model_max_length")
    if longest is not None and (not is_finite_number(longest) or longest <= 0):
        raise ValueError(f"{file}: model_max_length must be a positive number, got {shown(longest)}; correct the file")
    return settings


def _folder_faults(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield (
            f"no such folder: {folder}; give a model folder on disk (`hf download NAME --local-dir FOLDER` fetches one)"
        )
        return
    if not is_hugging_face(folder):
        try:
            tokenizer_in(folder)
        except ValueError as error:
            yield str(error)
        return
    yield from remote_code_faults(folder)
    if dangling := list(_dangling_links(folder)):
        yield from dangling
        return
    if not any(folder.glob("*.safetensors")):
        yield f"{folder} holds no *.safetensors; save the model with safetensors"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        yield f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from the model"
    if (folder / "adapter_config.json").is_file():
        yield (
            f"{folder} holds an adapter (adapter_config.json), which transformers would add to the weights; merge it"
            " into them, or remove the file"
        )
    readers: list[Callable[[], object]] = [partial(declared_stop_ids, folder), partial(token_ids, folder)]
    if any(folder.glob("*.safetensors")):
        readers.append(partial(weight_index, folder))
    if (folder / "tokenizer_config.json").exists():
        readers.append(partial(tokenizer_settings, folder))
    readers += [partial(read_json_object, folder / name) for name in _OBJECTS if (folder / name).exists()]
    readers += [partial(read_text, folder / name) for name in _TEXTS if (folder / name).exists()]
    found: list[str] = []
    for reader in readers:
        try:
            reader()
        except ValueError as error:
            found.append(str(error))
    yield from dict.fromkeys(found)  # a file that two readers read has one fault


def _dangling_links(folder: Path) -> Iterator[str]:
    """Of a copied cache, for example: such a file would count as left out, and with it ids that end an answer."""
    for path in sorted(folder.glob("[!.]*")):
        if path.is_symlink() and not path.exists():
            yield (
                f"{path} is a link to {path.readlink()}, which is not there; copy the folder with the files that its"
                " links name (cp -rL), or download it again"
            )


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token in a tokenizer.json."""
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token that a tokenizer_config.json adds."""
    return {token["content"]: int(number) for number, token in (settings.get("added_tokens_decoder") or {}).items()}


def _read_ids(file: Path, ids_of: Callable[[Mapping[str, Any]], dict[str, int]]) -> dict[str, int]:
    content = read_json_object(file)
    try:
        ids = ids_of(content)
        is_sound = all(isinstance(token, str) and isinstance(number, int) for token, number in ids.items())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: is not laid out as a tokenizer's ({error!r}); {_AGAIN}") from error
    if not is_sound:
        raise ValueError(f"{file}: has tokens that are no text, or ids that are no numbers; {_AGAIN}")
    return ids
