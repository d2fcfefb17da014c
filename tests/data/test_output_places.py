"""Where results are written: through links, into folders that are there already, and never into nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rlt.cli import main
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.paths import folder_faults, output_file_faults
from megatron_rlt.data.shards import read_manifest
from megatron_rlt.launch.launch import run_job
from megatron_rlt.whole_files import require_writable, write_text
from tests.data.sources import GOOD, prepare, write_lines
from tests.parallel.launched_jobs import counts_ranks


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", GOOD)


def test_shards_go_where_a_link_leads(source: Path, tmp_path: Path) -> None:
    """To an empty folder, to one that is not there yet, and through a link to a link; a second start finds them."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "to_folder").symlink_to("scratch")
    (tmp_path / "to_nothing").symlink_to(tmp_path / "new" / "place")
    (tmp_path / "to_link").symlink_to("to_other")
    (tmp_path / "to_other").symlink_to("other")
    places = {"to_folder": "scratch", "to_nothing": "new/place", "to_link": "other"}
    for link, place in places.items():
        assert not prepare(tmp_path / link, source).reused
        assert (tmp_path / link).is_symlink()
        assert read_manifest(tmp_path / place).num_rows == 1
        assert prepare(tmp_path / link, source).reused
    assert not list(tmp_path.rglob(".partial-*"))


def test_an_empty_folder_keeps_its_place_and_a_killed_start_is_no_content(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    inode = folder.stat().st_ino
    (folder / ".partial-1").mkdir()
    (folder / ".partial-1" / "shard-000000.tar").write_bytes(b"half")
    prepare(folder, source)
    assert folder.stat().st_ino == inode  # a mount or a shared folder cannot be replaced
    assert read_manifest(folder).num_rows == 1


def test_a_folder_with_other_content_stays_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "link").symlink_to("full")
    with pytest.raises(ValueError, match="is not an empty folder"):
        prepare(tmp_path / "link", source)


def test_a_file_behind_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "file.txt")
    for text in ("first", "second"):
        write_text(tmp_path / "link.txt", text)
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "real" / "file.txt").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.txt", "link.txt", "real"]


def bad_places(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "file").touch()
    (folder / "to_file").symlink_to("file")
    (folder / "below_file").symlink_to(folder / "file" / "run")
    (folder / "loop").symlink_to("loop")
    return {
        "a file": (folder / "file", "is a file"),
        "below a file": (folder / "file" / "a" / "b", "is a file"),
        "a link to a file": (folder / "to_file", "is a file"),
        "a link below a file": (folder / "below_file", "is a file"),
        "a link to itself": (folder / "loop", "leads to itself"),
        "below a link to itself": (folder / "loop" / "run", "leads to itself"),
    }


def test_places_that_cannot_be_folders_are_named_before_anything_is_read(tmp_path: Path) -> None:
    for name, (place, rule) in bad_places(tmp_path).items():
        (fault,) = folder_faults("output_dir", place)
        assert fault.startswith("output_dir: "), name
        assert rule in fault, name
        (fault,) = output_file_faults("output", place / "scores.parquet")
        assert rule in fault, name
    assert folder_faults("output_dir", tmp_path / "new" / "run") == []
    assert output_file_faults("output", tmp_path / "new" / "scores.parquet") == []
    (fault,) = output_file_faults("output", tmp_path)
    assert "must be a Parquet file to write" in fault


@pytest.mark.parametrize("place", ["/proc/run", "/proc/self/run/a", "/dev/null/run"])
def test_a_place_that_only_writing_shows_to_be_none_is_one_line(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"output_dir: {place} cannot be written \("):
        require_writable("output_dir", Path(place))
    settings = JobConfig.model_validate({"output_dir": place})
    with pytest.raises(ValueError, match="cannot be written"):
        run_job(counts_ranks, settings, 1)


def test_prepare_says_where_it_cannot_write(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prepare.yaml").write_text(f"input: [{source}]\noutput_dir: /proc/data\n")
    assert main(["prepare", str(tmp_path / "prepare.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output_dir: /proc cannot be written" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    (fault,) = folder_faults("output_dir", tmp_path / "closed" / "run")
    assert "is not writable" in fault
