"""The virtual environment that TRL lives in: made once, in `build/`, never mixed with the project's own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

# Newest versions that take the project's torch and transformers as they are.
_PINNED = ("trl==1.16.0", "accelerate==1.15.0")
ROOT = Path(__file__).parents[2]


def packages() -> tuple[str, ...]:
    """What is installed, in order: torch and transformers as here, so that both sides run the same kernels."""
    torch, transformers = (f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    return (torch, transformers, *_PINNED)


def trl_python() -> Path:
    """The environment's interpreter; installs what is missing, which takes minutes the first time.

    Raises subprocess.CalledProcessError if pip fails; what it said stands above.
    """
    folder = ROOT / "build" / "bench-trl"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(packages())
    if installed.is_file() and installed.read_text() == wanted:
        return python
    Console().print(f"Installing {', '.join(packages())} into {folder.relative_to(ROOT)} (once) ...")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch comes first and pinned: an open range would replace the CPU build by gigabytes of CUDA packages.
    subprocess.run([*pip, packages()[0]], check=True)
    subprocess.run([*pip, *packages()], check=True)
    installed.write_text(wanted)
    return python
