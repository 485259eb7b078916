"""One process a folder, and no lock that outlives its process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedward_common.errors import UsageError
from fedward_common.home_lock import lock_home

_HOLDER = """
import sys
from pathlib import Path
from fedward_common.home_lock import lock_home
descriptor = lock_home(Path(sys.argv[1]), holder="nobody", remedy="none")
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.lock"


def lock(file: Path, wait_s: float = 0) -> int:
    return lock_home(file, holder=f"another one uses {file.parent}", remedy="Stop it.", wait_s=wait_s)


@contextmanager
def another_process(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", _HOLDER, str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_folder_that_another_process_has_is_refused_and_its_process_is_named(file: Path) -> None:
    with another_process(file) as process, pytest.raises(UsageError) as caught:
        lock(file)

    message = f"another one uses {file.parent} (locked by process {process.pid})"
    assert (caught.value.message, caught.value.remedy) == (message, "Stop it.")


def test_folder_cannot_be_locked_twice_in_one_process_either(file: Path) -> None:
    descriptor = lock(file)

    with pytest.raises(UsageError):
        lock(file)

    os.close(descriptor)
    os.close(lock(file))


def test_killed_process_leaves_no_stale_lock(file: Path) -> None:
    with another_process(file) as process:
        process.kill()
        process.wait()

        descriptor = lock(file)

    assert file.read_text() == f"{os.getpid()}\n"
    os.close(descriptor)


def test_lock_is_held_by_a_child_that_inherited_it(file: Path) -> None:
    descriptor = lock(file)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(descriptor,)) as child:
        os.close(descriptor)
        with pytest.raises(UsageError):
            lock(file)
        child.kill()
        child.wait()

        os.close(lock(file))


def test_lock_is_not_inherited_unasked(file: Path) -> None:
    descriptor = lock(file)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        os.close(descriptor)

        os.close(lock(file))

        child.kill()


def test_lock_is_taken_as_soon_as_it_is_free_while_somebody_waits(file: Path) -> None:
    with another_process(file) as process:
        taken: list[int] = []
        waiting = threading.Thread(target=lambda: taken.append(lock(file, wait_s=60)))
        waiting.start()
        process.kill()
        waiting.join(60)

    (descriptor,) = taken
    os.close(descriptor)


def test_lock_file_is_private(file: Path) -> None:
    descriptor = lock(file)

    assert file.stat().st_mode & 0o777 == 0o600
    os.close(descriptor)


def test_file_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for file in (tmp_path / "nowhere" / "some.lock", link):
        with pytest.raises(UsageError) as caught:
            lock(file)
        assert caught.value.remedy
    assert not (tmp_path / "elsewhere").exists()
