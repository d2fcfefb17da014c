"""What a node has of a network, against the machine itself and a folder laid out as Linux does."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.parallel.network import active_infiniband_ports, interface_towards


def test_the_interface_is_that_of_the_own_address() -> None:
    assert interface_towards("127.0.0.1", 20_000) == "lo"
    assert interface_towards("no-such-host.invalid", 20_000) is None


def test_only_active_infiniband_ports_are_found(tmp_path: Path) -> None:
    ports = {
        "mlx5_0/ports/1": ("4: ACTIVE", "InfiniBand"),
        "mlx5_1/ports/1": ("1: DOWN", "InfiniBand"),
        "mlx5_2/ports/1": ("4: ACTIVE", "Ethernet"),
        "mlx5_3/ports/2": ("4: ACTIVE", "InfiniBand"),
    }
    for name, (state, layer) in ports.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state").write_text(f"{state}\n")
        (tmp_path / name / "link_layer").write_text(f"{layer}\n")
    assert active_infiniband_ports(tmp_path) == ("mlx5_0:1", "mlx5_3:2")
    assert active_infiniband_ports(tmp_path / "none") == ()
