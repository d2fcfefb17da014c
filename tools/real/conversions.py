"""A really trained model through all kinds of folders and back: `python -m tools.real.conversions MODEL WORK`.

MODEL is the folder that `tools.real.model` writes. Every conversion is a process of its own, as a user starts it: first
the ring hf, megatron, nemo, bridge, hf with a certificate each, then the other pairs. Compared are all tensors, the
log-probs of the fixed prompts bit by bit, and the files; measured are time and peak memory. Writes
`docs/results/real_conversions.json`, anew after each conversion; exits with 1 if anything differs. Called again on
WORK, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.convert.census import file_hashes
from tools.bench.machine import describe_machine

_RING = ("hf", "megatron", "nemo", "bridge")
_AGAIN = "hf again"
_CERTIFICATE = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """One conversion: where from, where to, and what it took; None where an earlier start of this program made it."""

    source: str
    target: str
    certified: bool
    seconds: float | None  # wall
    cpu_seconds: float | None
    peak_bytes: int | None  # resident, program and libraries included
    stored_bytes: int  # of the target's tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("work", type=Path, help="folder for the converted ones")
    parser.add_argument("--out", type=Path, default=Path("docs/results/real_conversions.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folders = {"hf": arguments.model}
    conversions: list[Conversion] = []
    equal, machine = False, describe_machine()
    for source, target, options in _plan():
        folder = folders[target if not options else f"{target} of {source}"] = (
            arguments.work / f"{source}-{target.replace(' ', '-')}"
        )
        conversions.append(_convert(folders[source], target, source, folder, options))
        if len(conversions) >= len(_RING):
            equal = _write(arguments.out, machine, folders, conversions)
    sys.exit(not equal)


def _plan() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Source, target and options of every conversion: the ring, then the other pairs without certificates."""
    ring = list(itertools.pairwise((*_RING, _AGAIN)))
    for source, target in ring:
        yield source, target, ()
    for source, target in itertools.permutations(_RING, 2):
        if (source, target) not in ring and (source, target) != (_RING[-1], "hf"):
            yield source, target, ("--certify", "none")


def _write(out: Path, machine: dict[str, Any], folders: dict[str, Path], conversions: list[Conversion]) -> bool:
    """Write the record; returns whether everything is equal."""
    compared = _comparison(folders)
    record = {
        "command": "python -m tools.real.conversions MODEL WORK",
        "machine": machine,
        "compared": compared,
        "conversions": [asdict(one) for one in conversions],
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return all(compared["equal"].values())


def _convert(model: Path, target: str, source: str, folder: Path, options: tuple[str, ...]) -> Conversion:
    """Convert in a process of its own. Raises subprocess.CalledProcessError if it fails."""
    seconds = cpu_seconds = peak_bytes = None
    if not folder.exists():
        command = [sys.executable, "-m", "megatron_rlt", "convert", str(model), str(folder)]
        command += ["--to", target.split()[0], *options]
        print(" ".join(command[2:]), flush=True)
        begun = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status != 0:
            raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
        seconds = round(time.perf_counter() - begun, 2)
        cpu_seconds, peak_bytes = round(used.ru_utime + used.ru_stime, 2), used.ru_maxrss * 1024
    stored_bytes = sum(map(_num_bytes, _read(folder)["tensors"].values()))
    return Conversion(source, target, not options, seconds, cpu_seconds, peak_bytes, stored_bytes)


def _num_bytes(tensor: dict[str, Any]) -> int:
    size = {"float32": 4, "bfloat16": 2}[tensor["dtype"]]
    for dimension in tensor["shape"]:
        size *= dimension
    return size


def _comparison(folders: dict[str, Path]) -> dict[str, Any]:
    """What is equal among all folders, the log-probs by reader, and the hashes of all files."""
    certificates = {name: _read(folder) for name, folder in folders.items() if name != "hf"}
    first = certificates["megatron"]
    hashes = {name: {k: one["sha256"] for k, one in found["tensors"].items()} for name, found in certificates.items()}
    logprobs: dict[str, list[Any]] = {}
    for found in certificates.values():
        if found["logprobs"] is not None:
            for reader, values in zip(
                found["logprobs"]["readers"], (found["logprobs"]["source"], found["logprobs"]["target"]), strict=True
            ):
                logprobs.setdefault(reader, []).append(values)
    files = {name: _files(folder) for name, folder in folders.items()}
    written = {name: kept for name, kept in files.items() if name.startswith("hf ")}
    weights = {name: {k: v for k, v in kept.items() if k.endswith(".safetensors")} for name, kept in written.items()}
    tokenizers = [v for kept in files.values() for k, v in kept.items() if Path(k).name == "tokenizer.json"]
    return {
        "equal": {
            f"the hashes of all {len(first['tensors'])} tensors, in {len(hashes)} conversions": all(
                found == hashes["megatron"] for found in hashes.values()
            ),
            **{
                f"log-probs by {reader}, to the last bit, {len(values)} readings": all(
                    one == values[0] for one in values
                )
                for reader, values in logprobs.items()
            },
            f"safetensors files of {len(weights)} ways back": len({str(kept) for kept in weights.values()}) == 1,
            f"tokenizer.json in {len(tokenizers)} of {len(files)} folders": len(set(tokenizers)) == 1,
        },
        "largest difference of a log-prob between the readers": first["logprobs"]["max_difference"],
        "files": files,
    }


def _read(folder: Path) -> dict[str, Any]:
    certificate: dict[str, Any] = json.loads((folder / _CERTIFICATE).read_text(encoding="utf-8"))
    return certificate


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    places = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    return {
        str((place / name).relative_to(folder)): digest
        for place in places
        for name, digest in file_hashes(place).items()
        if name != _CERTIFICATE
    }


if __name__ == "__main__":
    main()
