"""Which safetensors files of a Hugging Face folder hold its weights: one file, or those that an index names."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.given_files import read_json_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_AGAIN = "download the folder again"


def weight_index(folder: Path) -> dict[str, str] | None:
    """File name by tensor name, or None where the folder holds a single file.

    Raises:
        ValueError: neither is there, the index is damaged, or it names other files than the single one beside it:
            transformers would load the single file, vLLM what the index names.
    """
    is_single, path = (folder / SINGLE_FILE).is_file(), folder / INDEX_FILE
    if not path.is_file():
        if is_single:
            return None
        raise ValueError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; save the model with safetensors "
            "(transformers: save_pretrained)"
        )
    weight_map = read_json_object(path, remedy=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: holds no weight_map of tensor names to files; {_AGAIN}")
    outside = next((file for file in weight_map.values() if Path(file).name != file), None)
    if outside is not None:
        raise ValueError(f"{path}: names the file {outside!r} outside the folder; {_AGAIN}")
    others = sorted(set(weight_map.values()) - {SINGLE_FILE})
    if is_single and others:
        raise ValueError(
            f"{folder}: holds {SINGLE_FILE} and {INDEX_FILE}, which names other files ({others[0]}); remove the one"
            " that is not this model's: transformers would load the first, others what the second names"
        )
    return None if is_single else weight_map
