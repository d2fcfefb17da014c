"""Secrets of servers at addresses: refused where they would be written or printed, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_overrides
from megatron_rlt.config.server_access import address_faults, read_key

SECRET = "s3cr3t-key"


def test_a_key_is_the_one_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for content in (SECRET, f"{SECRET}\n", f"  {SECRET}\r\n"):
        file.write_text(content)
        assert read_key(file) == SECRET


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{SECRET}\nsecond\n".encode(), "has 2 lines; it must hold the key alone, in one line"),
        (f"{SECRET}\rsecond".encode(), "has 2 lines"),
        (b"\n", "has 0 lines"),
        (f"key: {SECRET}".encode(), "has characters that no key has; it must hold visible ASCII without spaces"),
        (f"{SECRET}\0".encode(), "has characters"),
        (f"{SECRET}\xff".encode("latin-1"), "has characters"),
    ],
)
def test_a_file_that_holds_more_than_a_key_is_refused_without_showing_it(
    content: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="api_key_file") as caught:
        read_key(file)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@node7:8000",
        f"http://{SECRET}@node7",
        f"http://user:{SECRET}@node7:8000/path",
        f"{SECRET}@node7:8000",
        f"http://node7:8000?key={SECRET}",
        f"http://node7#{SECRET}",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(address: str) -> None:
    (fault,) = address_faults(["http://node6:8000", address])
    assert "rollout.vllm.server.addresses: number 2 has" in fault
    assert SECRET not in fault


@pytest.mark.parametrize(
    "address",
    ["node7:8000", "http://", "http://a:x", "http://a:99999", "http://[::1", "ftp://a", "http://a/", "http://a b"],
)
def test_what_is_no_address_is_named(address: str) -> None:
    assert address_faults([address]) == [
        f"rollout.vllm.server.addresses: {address!r} is no address such as http://node7:8000"
    ]


def test_host_and_port_are_an_address() -> None:
    assert address_faults(["http://node7:8000", "https://[fd00::7]:8000", "http://10.0.0.7"]) == []


def test_an_address_of_a_wrong_type_does_not_show_its_password_either() -> None:
    override = f"rollout.vllm.server.addresses=http://user:{SECRET}@node7:8000"
    with pytest.raises(ValueError, match="addresses") as caught:
        load_overrides(TrainConfig, {}, [override])
    assert "://***@node7:8000" in str(caught.value)
    assert SECRET not in str(caught.value)
