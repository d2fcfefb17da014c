"""System calls that the kernel refuses from now on in this process: file systems that this machine cannot mount.

Quotas need a kernel with CONFIG_QFMT_V2 or CONFIG_TMPFS_QUOTA, or Btrfs; file systems without locks are network ones. A
seccomp filter stands for them: the call of this process and of its children does not reach the file system, and
returns the number that such a one returns. It looks at no path: all files are refused.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Mapping

import pytest

_NUMBERS = {
    "x86_64": {"write": 1, "pwrite64": 18, "flock": 73, "fsync": 74, "writev": 20},
    "aarch64": {"write": 64, "pwrite64": 68, "flock": 32, "fsync": 82, "writev": 66},
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _IS_EQUAL, _IS_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_OFFSET, _THIRD_ARGUMENT_OFFSET = 0, 32  # of struct seccomp_data, little-endian low words


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(calls: Mapping[str, int], *, min_bytes: int = 0) -> None:
    """Let these calls fail with these numbers of errno; `write` and its kin only of at least so many bytes.

    Nothing takes it back: call it in a process of its own.
    """
    numbers = _NUMBERS[platform.machine()]
    code = [_statement(_LOAD, _NUMBER_OFFSET)]
    for name, error in calls.items():
        if name in ("write", "pwrite64"):
            checks = [
                _statement(_IS_EQUAL, numbers[name], if_true=0, if_false=4),
                _statement(_LOAD, _THIRD_ARGUMENT_OFFSET),
                _statement(_IS_AT_LEAST, min_bytes, if_true=0, if_false=1),
                _statement(_RETURN, _ERRNO | error),
                _statement(_LOAD, _NUMBER_OFFSET),
            ]
        else:
            checks = [
                _statement(_IS_EQUAL, numbers[name], if_true=0, if_false=1),
                _statement(_RETURN, _ERRNO | error),
            ]
        code += checks
    code.append(_statement(_RETURN, _ALLOW))
    text = b"".join(code)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code), text)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)) == 0, ctypes.get_errno()


def skip_without_filters() -> None:
    """Skip the test where the numbers of system calls are not known."""
    if platform.machine() not in _NUMBERS:
        pytest.skip(f"the numbers of system calls on {platform.machine()} are not known here")


def _statement(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
