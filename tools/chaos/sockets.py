"""Which TCP and UDP sockets processes listen on, read from /proc as root or as their user."""

from __future__ import annotations

import ipaddress
import os
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_SECONDS = 0.02
_LISTENING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # state, from linux/tcp_states.h


@dataclass(frozen=True)
class ListeningSocket:
    """One socket at which others can reach a process."""

    process_id: int
    protocol: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def listening_sockets(process_ids: Iterable[int] | None = None) -> list[ListeningSocket]:
    """The listening sockets of some processes; by default of this one."""
    found = []
    for process_id in [os.getpid()] if process_ids is None else process_ids:
        inodes = _sockets_of(process_id)
        for protocol in _LISTENING:
            with suppress(FileNotFoundError, ProcessLookupError):
                lines = Path(f"/proc/{process_id}/net/{protocol}").read_text().splitlines()[1:]
                found += [
                    ListeningSocket(process_id, protocol, *_endpoint(words[1]))
                    for words in map(str.split, lines)
                    if words[3] == _LISTENING[protocol] and words[9] in inodes
                ]
    return found


def _sockets_of(process_id: int) -> set[str]:
    inodes = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
            with suppress(FileNotFoundError):
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    return inodes


def _endpoint(text: str) -> tuple[str, int]:
    """`0100007F:1F90` -> ("127.0.0.1", 8080): words of the address in the machine's byte order."""
    address, port = text.split(":")
    words = [struct.pack("=I", int(address[start : start + 8], 16)) for start in range(0, len(address), 8)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def sockets_while_it_runs(process_id: int, is_running: Callable[[], bool]) -> set[ListeningSocket]:
    """Every socket on which a process or one beneath it listens, looked for again and again until it ends."""
    found: set[ListeningSocket] = set()
    while is_running():
        with suppress(psutil.NoSuchProcess):
            beneath = psutil.Process(process_id).children(recursive=True)
            found.update(listening_sockets([process_id, *(process.pid for process in beneath)]))
        time.sleep(_POLL_SECONDS)
    return found
