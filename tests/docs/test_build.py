"""The documentation builds without a warning and without network, and what it is built to needs none either."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tests.docs.pages import ROOT, page_names

# What a browser fetches by itself; a link that a reader follows is none.
_FETCHED = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?((?:https?:)?//[^"'\s>]+)""")
_LINKED = re.compile(r"<link\b[^>]*>")
_REMOTE = re.compile(r"""\bhref=["']?((?:https?:)?//[^"'\s>]+)""")


def build_site(config_file: Path, site: Path) -> None:
    """Build as `make docs` does, into another folder; any use of the network is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("the build reaches for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        build(load_config(str(config_file), site_dir=str(site)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site(ROOT / "mkdocs.yml", folder)
    return folder


def test_every_page_is_built(site: Path) -> None:
    assert load_config(str(ROOT / "mkdocs.yml")).strict
    for page in (*page_names(), "reference/configuration.md", "reference/commands.md"):
        assert "<h1" in (site / page).with_suffix(".html").read_text(encoding="utf-8"), page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    found = {remote for page in site.rglob("*.html") for remote in remote_sources(page.read_text(encoding="utf-8"))}
    assert found == set()
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"url\(['\"]?(?:https?:)?//", style) for style in styles)


def test_the_picture_of_the_data_flow_is_shipped_with_its_page(site: Path) -> None:
    assert 'src="data-flow.svg"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "data-flow.svg").read_bytes() == (ROOT / "docs" / "data-flow.svg").read_bytes()


def test_a_remote_font_would_be_found() -> None:
    page = '<link rel="stylesheet" href="https://fonts.example/x.css"><script src="//cdn.example/x.js"></script><a href="https://x">'
    assert remote_sources(page) == {"https://fonts.example/x.css", "//cdn.example/x.js"}


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[nowhere](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        build_site(tmp_path / "mkdocs.yml", tmp_path / "site")


def remote_sources(html: str) -> set[str]:
    """Addresses that a browser fetches with a page."""
    links = {remote for link in _LINKED.findall(html) for remote in _REMOTE.findall(link)}
    return links | set(_FETCHED.findall(html))
