"""Where servers are, and with which key: secrets are refused where they would be written or printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit


def read_key(file: Path) -> str:
    """The key that a file holds. Raises ValueError, without the key, unless it is one line of visible ASCII."""
    where = f"rollout.vllm.server.api_key_file: {file}"
    if not file.is_file():
        raise ValueError(f"{where} is no file; write the key into it")
    try:
        lines = file.read_bytes().strip().splitlines()
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if len(lines) != 1:
        raise ValueError(f"{where} has {len(lines)} lines; it must hold the key alone, in one line")
    if not all(33 <= byte <= 126 for byte in lines[0]):
        raise ValueError(f"{where} has characters that no key has; it must hold visible ASCII without spaces")
    return lines[0].decode("ascii")


def address_faults(addresses: Sequence[str]) -> list[str]:
    """What is wrong with the servers' addresses; a fault shows no address that may hold a secret."""
    where = "rollout.vllm.server.addresses:"
    faults = []
    for number, address in enumerate(addresses, start=1):
        if "@" in address:
            faults.append(
                f"{where} number {number} has a user or a password before its @, which would stand in config.yaml and"
                " in messages; write a key into a file and name that in api_key_file"
            )
        elif any(one in address for one in "?#"):
            faults.append(f"{where} number {number} has more than host and port, such as http://node7:8000")
        elif not _is_address(address):
            faults.append(f"{where} {address!r} is no address such as http://node7:8000")
    return faults


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError:  # of a port that is no number, or an IPv6 address without its bracket
        return False
    is_plain = text == f"{parts.scheme}://{parts.netloc}" and text.isprintable() and " " not in text
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_plain
