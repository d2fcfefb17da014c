"""What this node has of a network: the interface that reaches an address, and InfiniBand ports that are up."""

from __future__ import annotations

import socket
from pathlib import Path

_INFINIBAND = Path("/sys/class/infiniband")


def address_towards(address: str, port: int) -> str | None:
    """The address that this node would send from; None if the name or the way is unknown."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(address: str, port: int) -> str | None:
    """The interface of `address_towards`; None if there is none."""
    own = address_towards(address, port)
    if own is None:
        return None
    import psutil  # here: most commands need no network

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    return None


def active_infiniband_ports(folder: Path = _INFINIBAND) -> tuple[str, ...]:
    """Ports such as `mlx5_0:1` that are active and speak InfiniBand. Ethernet ports (RoCE) are left to the user."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, layer = (_text(port / name) for name in ("state", "link_layer"))
        if "ACTIVE" in state and layer == "InfiniBand":
            found.append(f"{port.parents[1].name}:{port.name}")
    return tuple(found)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
