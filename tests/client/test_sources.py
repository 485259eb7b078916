"""The folder source: stable order, and nothing from outside the folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from fedward_client.sources import folder
from fedward_client.sources.folder import find_files, read_content
from fedward_client.sources.refresh import Wanted, watch_source
from fedward_client.sources.settings import FolderConfig, Selection
from fedward_common.errors import CohortError


def test_files_come_in_byte_order_at_any_depth(tmp_path: Path) -> None:
    for name in ("b/2.dcm", "a/z/1.dcm", "a/1.dcm", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    found = list(find_files(tmp_path))

    assert [each.name for each in found] == [b"a/1.dcm", b"a/z/1.dcm", b"b/2.dcm", b"c"]
    assert [each.size for each in found] == [7, 9, 7, 1]


def test_names_need_not_be_text(tmp_path: Path) -> None:
    name = b"M\xfcller\xff.dcm"
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"x")

    assert [each.name for each in find_files(tmp_path)] == [name]
    assert read_content(tmp_path, name).data == b"x"


def test_no_symbolic_link_is_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "other.dcm").write_bytes(b"secret")
    root = tmp_path / "dicom"
    root.mkdir()
    (root / "own.dcm").write_bytes(b"own")
    (root / "file").symlink_to(secret / "other.dcm")
    (root / "folder").symlink_to(secret)
    (root / "loop").symlink_to(root)

    assert [each.name for each in find_files(root)] == [b"own.dcm"]
    for name in (b"file", b"folder/other.dcm", b"../secret/other.dcm"):
        with pytest.raises(OSError, match="link"):
            read_content(root, name)


def test_a_folder_that_cannot_be_listed_is_counted_and_not_passed_over(tmp_path: Path) -> None:
    step = "d" * 250
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(17):  # until the path is longer than the system takes
        os.mkdir(step, dir_fd=here)
        below = os.open(step, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)

    found = [each.name for each in find_files(tmp_path)]

    subprocess.run(["rm", "-rf", tmp_path / step], check=True)
    (name,) = found
    assert set(name) == set(b"d/")
    with pytest.raises(OSError, match="too long"):
        read_content(tmp_path, name)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.dcm").write_bytes(b"a")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert [each.name for each in find_files(tmp_path / "link")] == [b"a.dcm"]
    assert read_content(tmp_path / "link", b"a.dcm").data == b"a"


def test_folders_nested_deeper_than_pythons_stack_do_no_harm(tmp_path: Path) -> None:
    depth = 1200
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("deep.dcm", os.O_CREAT, dir_fd=here))
    os.close(here)

    found = [each.name for each in find_files(tmp_path)]

    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for pytest's own cleaning
    assert found == [b"d/" * depth + b"deep.dcm"]


def test_a_pipe_is_neither_listed_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert list(find_files(tmp_path)) == []
    with pytest.raises(OSError, match="regular"):
        read_content(tmp_path, b"pipe")


def test_a_folder_that_is_not_there_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="cannot be listed") as caught:
        list(find_files(tmp_path / "absent"))
    assert "mounted" in caught.value.remedy


def test_a_file_too_large_to_hold_is_hashed_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 1000)
    (tmp_path / "large").write_bytes(b"x" * 3000)

    content = read_content(tmp_path, b"large")

    assert content.data is None
    assert content.sha256 == hashlib.sha256(b"x" * 3000).hexdigest()


def test_watching_a_folder_yields_when_something_changed(tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    watch = watch_source(FolderConfig(path=folder, poll_s=0.1), tmp_path, lambda: Wanted(Selection()))

    def arrive() -> None:
        folder.mkdir()
        (folder / "a.dcm").write_bytes(b"a")

    threading.Timer(0.3, arrive).start()
    next(watch)  # not before there is a file
    assert [each.name for each in find_files(folder)] == [b"a.dcm"]

    for change in (
        lambda: (folder / "b.dcm").write_bytes(b"b"),
        lambda: (folder / "b.dcm").write_bytes(b"longer"),
        lambda: (folder / "a.dcm").unlink(),
    ):
        later = threading.Timer(0.3, change)
        later.start()
        next(watch)
        assert later.finished.is_set()
    watch.close()
