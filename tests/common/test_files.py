"""Small files: the old content or the new, private from the first moment, and no drafts left behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedward_common.files import write_atomically, write_new


def test_file_is_private_even_with_a_permissive_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_new(tmp_path / "new", b"secret")
        write_atomically(tmp_path / "atomic", b"secret")
        write_atomically(tmp_path / "public", b"roster", 0o644)
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o600, "atomic": 0o600, "public": 0o644}


def test_new_file_never_replaces_or_follows_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")

    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"new")

    assert (tmp_path / "file").read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


def test_replacing_leaves_the_new_content_alone(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "file", content)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"two"}


def test_name_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_full_disk_leaves_the_old_content_and_no_draft(tmp_path: Path) -> None:
    """A limit on file size, which makes the kernel take a part and then refuse."""
    (tmp_path / "file").write_bytes(b"old")
    script = """
        import resource, signal, sys
        from pathlib import Path
        from fedward_common.files import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomically(Path(sys.argv[1]), bytes(5000))
        except OSError:
            sys.exit(9)
    """

    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "file")]
    ended = subprocess.run(command, check=False, timeout=60)

    assert ended.returncode == 9
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
