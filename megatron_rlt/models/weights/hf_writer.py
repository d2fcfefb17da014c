"""Writes a Hugging Face folder from one process; a folder of the final name is always complete.

In: named CPU tensors and the model's source folder. Out: safetensors shards with their index, config.json with the
tensors' dtype, tokenizer files. `export` runs the collectives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlt.config.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_rlt.disk_faults import writing
from megatron_rlt.whole_files import flush_to_disk, make_folder, sweep_beside, temporary_beside

_CONFIG_FILE = "config.json"
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configuration, vocabularies, chat templates
_COPIED_FOLDERS = ("additional_chat_templates",)
_INDEX_SUFFIX = ".index.json"  # the index of the source's weights, in any format


def check_folders(source: Path, target: Path) -> str | None:
    """Why `source`'s model cannot be exported to `target`, or None."""
    if not (source / _CONFIG_FILE).is_file():
        return f"{source}: no {_CONFIG_FILE}; the source of an export must be the model's Hugging Face folder"
    if target.exists():
        return f"{target}: exists already, and an export never overwrites; remove it or choose another folder"
    return None


def write_folder(tensors: Iterable[tuple[str, Tensor]], source: Path, target: Path, *, max_shard_bytes: int) -> None:
    """Write a folder beside `target`, flush it to disk, then rename it; a failure leaves nothing."""
    sweep_beside(target)  # an export that was killed
    partial = temporary_beside(target)
    make_folder(partial)
    try:
        with writing(target):
            dtype = write_weights(tensors, partial, max_shard_bytes)
            copy_side_files(source, partial)
            config = json.loads((source / _CONFIG_FILE).read_text(encoding="utf-8"))
            write_config(config, partial, dtype)
            for path in (*sorted(partial.rglob("*")), partial):
                flush_to_disk(path)
            partial.rename(target)
            flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> torch.dtype:
    """Write shards one by one; file names include the number of shards, so files are renamed at the end.

    Raises:
        ValueError: the tensors have several dtypes, of which config.json could name only one.
    """
    dtypes: set[torch.dtype] = set()
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in _shards(tensors, max_shard_bytes):
        _save(shard, folder / f"shard-{len(shards)}")
        shards.append(list(shard))
        dtypes |= {tensor.dtype for tensor in shard.values()}
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(dtypes) != 1:
        raise ValueError(
            f"{folder}: a Hugging Face folder has one dtype, and these weights have {sorted(map(str, dtypes))}; choose"
            " one with --dtype"
        )
    total = len(shards)
    names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)] if total > 1 else [SINGLE_FILE]
    for index, name in enumerate(names):
        (folder / f"shard-{index}").rename(folder / name)
    if total > 1:
        weight_map = {tensor: name for name, shard_names in zip(names, shards, strict=True) for tensor in shard_names}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtypes.pop()


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        file.touch()
        mode = file.stat().st_mode  # of a new file here, by umask and the folder's own rules
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(stat.S_IMODE(mode))  # the library lets nobody else read them
    except SafetensorError as error:  # an OSError of the disk, as text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    yield shard


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation settings, with links resolved."""
    for path in sorted(source.iterdir()):
        copied = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(_INDEX_SUFFIX)
        if path.is_file() and copied and path.name != _CONFIG_FILE:
            shutil.copyfile(path, target / path.name)
    for name in _COPIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def write_config(source: Mapping[str, Any], target: Path, dtype: torch.dtype) -> None:
    """Write config.json with the weights' dtype, under transformers' older or newer key as found."""
    config = dict(source)
    word = str(dtype).removeprefix("torch.")
    if "dtype" in config:
        config["dtype"] = word
    if "torch_dtype" in config or "dtype" not in config:
        config["torch_dtype"] = word
    _write_json(target / _CONFIG_FILE, config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
