"""The environment of NVIDIA's tools, programs run in it, and models that its transformers 4 reads."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

_PYTHON = Path(__file__).parents[2] / ".venv-nemo" / "bin" / "python"
MARKS = [pytest.mark.slow, pytest.mark.skipif(not _PYTHON.exists(), reason="needs NeMo 2.7.3: `make test-nemo`")]


def run_oracle(script: str, *arguments: str | Path) -> str:
    """What a script beside this file prints; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(_PYTHON), str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def model_for_transformers4(folder: Path, **settings: Any) -> Path:
    """A Hugging Face folder whose tokenizer has as many ids as the vocabulary has rows."""
    tiny_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 3
    return tiny_hf_model(folder, num_layers=2, vocab_size=size, **settings)
