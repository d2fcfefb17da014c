"""Reads pickles of checkpoints as data: names become inert records, so that nothing in a file is ever called.

In: `.metadata` and `common.pt` of Megatron's folders. Out: plain values and `Record`s. Needs no torch: what torch saves
is a zip archive with one pickle, whose tensors become records too.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import IO, Any

_MAX_ARCHIVED_PICKLE_BYTES = 256 * 2**20  # of a torch archive: a small file could unpack to anything

# Packages whose types stand in checkpoints: settings, enumerations, tensor headers. They all become records.
_RECORDS = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w*Path|collections\.(deque|defaultdict)|signal\.Signals"
    r"|datetime\.\w+|functools\.partial|(torch|megatron|nemo|transformer_engine|numpy|lightning|ml_dtypes)(\.\w+)+)"
)
_VALUES: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.slice": slice,
    "_codecs.encode": lambda text, _encoding: text.encode("latin1"),  # how old protocols write bytes
}


class Record:
    """What a pickle says of an object: its type's name, the arguments it was built from, its fields."""

    type_name = ""

    def __new__(cls, *arguments: Any, **named: Any) -> Record:  # noqa: ANN401
        record = super().__new__(cls)
        record.arguments, record.fields = arguments, dict(named)
        return record

    arguments: tuple[Any, ...]
    fields: dict[str, Any]

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        if isinstance(state, dict):
            self.fields.update(state)
        else:
            self.arguments = state if isinstance(state, tuple) else (state,)

    def __setitem__(self, key: Any, value: Any) -> None:  # noqa: ANN401 - of subclasses of dict
        self.fields[key] = value

    def append(self, value: Any) -> None:  # noqa: ANN401 - of subclasses of list
        self.arguments = (*self.arguments, value)


def read_pickle(file: Path) -> Any:  # noqa: ANN401 - whatever it holds
    """Read a pickle file. Raises ValueError, naming the file, if it is damaged or names what no checkpoint needs."""
    with file.open("rb") as stream:
        return _load(stream, file)


def read_torch_file(file: Path) -> Any:  # noqa: ANN401
    """Read what `torch.save` wrote; tensors become records. Raises ValueError as `read_pickle`."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _MAX_ARCHIVED_PICKLE_BYTES:
                raise ValueError(f"{file}: not a file that torch saved; copy the checkpoint again")
            with archive.open(names[0]) as stream:
                return _load(stream, file)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{file}: damaged, or written by a torch older than 1.6 ({error}); copy it again") from error


@cache
def _record_type(name: str) -> type[Record]:
    return type(name.rpartition(".")[2], (Record,), {"type_name": name})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 - as the base class
        name = f"{module_name}.{global_name}"
        if name in _VALUES:
            return _VALUES[name]
        if not _RECORDS.fullmatch(name):
            raise pickle.UnpicklingError(f"it names {name}, which no checkpoint needs")
        return _record_type(name)

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401 - of a tensor's bytes
        return _record_type("torch.storage")(pid)


def _load(stream: IO[bytes], file: Path) -> Any:  # noqa: ANN401
    try:
        return _Unpickler(stream).load()
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{file}: damaged or more than data, of which nothing was run ({type(error).__name__}: {error}); take a"
            " checkpoint from a source you trust"
        ) from error
