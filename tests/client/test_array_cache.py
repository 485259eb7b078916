"""The cache of prepared arrays: nothing twice, nothing damaged, whatever happens to who writes it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedward_client import array_cache, array_shard
from fedward_client.array_cache import StoredArrays, cache_bytes, open_arrays, purge_cache
from fedward_client.array_shard import STEP, Row, open_shard
from fedward_common.errors import CohortError
from tests.absence import do_without
from tests.builders import a_disk_of

Values = NDArray[np.float32]
RECIPE = "ab" * 32
ROW_BYTES = 64


def a_row(number: int) -> Row:
    content = hashlib.sha256(b"%d" % number).hexdigest()
    return Row(content, (content,))


ROWS = tuple(map(a_row, range(12)))


def values_of(row: Row) -> Values:
    return np.full((1, 4, 4), int(row.key[:6], 16), dtype=np.float32)


class Preparing:
    """A prepare function that remembers what it was asked for."""

    def __init__(self, refused: Sequence[Row] = ()) -> None:
        self.asked: list[Row] = []
        self._refused = refused

    def __call__(self, rows: Sequence[Row]) -> Iterator[Values | None]:
        for row in rows:
            self.asked.append(row)
            yield None if row in self._refused else values_of(row)


def all_of(arrays: StoredArrays) -> Values:
    return arrays.take(range(len(arrays.rows)))


def expected(rows: Sequence[Row]) -> Values:
    return np.stack([values_of(row) for row in rows])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.*") if path.is_file())


def finished(folder: Path) -> list[Path]:
    return [path for path in files(folder) if not path.name.startswith(".")]


def test_a_second_call_prepares_nothing(tmp_path: Path) -> None:
    prepare = Preparing()
    open_arrays(tmp_path / "c", RECIPE, ROWS, prepare)
    assert prepare.asked == list(ROWS)

    arrays = open_arrays(tmp_path / "c", RECIPE, ROWS, prepare)

    assert len(prepare.asked) == 12
    assert arrays.rows == ROWS
    assert arrays.shape == (12, 1, 4, 4)
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS))
    np.testing.assert_array_equal(arrays.take([7, 2, 7]), expected([ROWS[7], ROWS[2], ROWS[7]]))


def test_a_changed_cohort_prepares_only_what_is_new(tmp_path: Path) -> None:
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS[:8], prepare)
    prepare.asked.clear()

    arrays = open_arrays(tmp_path, RECIPE, ROWS[::-1], prepare)

    assert prepare.asked == list(ROWS[:7:-1])
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS[::-1]))


def test_another_recipe_shares_nothing_and_disturbs_nothing(tmp_path: Path) -> None:
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS, prepare)
    open_arrays(tmp_path, "cd" * 32, ROWS, prepare)
    assert len(prepare.asked) == 24

    open_arrays(tmp_path, RECIPE, ROWS, prepare)
    assert len(prepare.asked) == 24


def test_files_can_be_read_with_public_tools(tmp_path: Path) -> None:
    open_arrays(tmp_path, RECIPE, ROWS, Preparing())
    (file,) = files(tmp_path)

    np.testing.assert_array_equal(load_file(file)["values"], expected(ROWS))


def test_int16_rows_are_at_most_half_a_step_away(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    values = random.uniform(-1, 1, (12, 1, 4, 4)).astype(np.float32)
    values[0, 0, 0, :3] = (-1, 0, 1)

    open_arrays(tmp_path, RECIPE, ROWS, lambda rows: iter(values), kind="int16")
    arrays = open_arrays(tmp_path, RECIPE, ROWS, Preparing(), kind="int16")

    found = all_of(arrays)
    assert np.abs(found - values).max() <= STEP / 2 * 1.001
    assert found[0, 0, 0, :3].tolist() == [-1, 0, 1]
    assert load_file(files(tmp_path)[0])["values"].dtype == np.int16
    with pytest.raises(ValueError, match="outside"):
        open_arrays(tmp_path, "cd" * 32, ROWS, Preparing(), kind="int16")


def test_refused_rows_leave_no_gap(tmp_path: Path) -> None:
    prepare = Preparing(refused := (ROWS[0], ROWS[5], ROWS[11]))
    rest = tuple(row for row in ROWS if row not in refused)

    arrays = open_arrays(tmp_path, RECIPE, ROWS, prepare)
    np.testing.assert_array_equal(all_of(arrays), expected(rest))
    assert arrays.rows == rest

    prepare.asked.clear()
    open_arrays(tmp_path, RECIPE, rest, prepare)
    assert prepare.asked == []


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no image can be decoded"):
        open_arrays(tmp_path, RECIPE, ROWS, Preparing(ROWS))

    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent", "longer", "header", "empty"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS, prepare)
    (file,) = files(tmp_path)
    data = file.read_bytes()
    written = {
        "cut": data[:-100],
        "garbage": b"\x80\x04." * 100,
        "longer": data + b"\0",
        "header": data[:8] + b"{" * 1016 + data[1024:],
        "empty": b"",
    }
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(written[damage])
    prepare.asked.clear()

    arrays = open_arrays(tmp_path, RECIPE, ROWS, prepare)

    assert prepare.asked == list(ROWS)
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS))
    assert len(files(tmp_path)) == 1


def test_many_small_files_become_one(tmp_path: Path) -> None:
    prepare = Preparing()
    rows = tuple(map(a_row, range(20)))
    for count in range(1, 18):
        open_arrays(tmp_path, RECIPE, rows[:count], prepare)
    assert len(files(tmp_path)) == 17

    arrays = open_arrays(tmp_path, RECIPE, rows, prepare)

    assert len(files(tmp_path)) == 1
    assert prepare.asked == list(rows)
    np.testing.assert_array_equal(all_of(arrays), expected(rows))


def test_a_large_cohort_lies_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "SHARD_BYTES", 5 * ROW_BYTES)

    arrays = open_arrays(tmp_path, RECIPE, ROWS, Preparing())
    arrays.will_need(range(12))

    assert len(files(tmp_path)) == 3
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS))
    assert arrays.num_bytes == 12 * ROW_BYTES


def test_the_disk_writes_while_images_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than all at once when the last one is there; what is written is the same."""
    begun: list[int] = []
    write_back = array_shard._write_back

    def watched(file: int) -> None:
        begun.append(os.fstat(file).st_size)
        write_back(file)

    monkeypatch.setattr(array_shard, "_write_back", watched)
    monkeypatch.setattr(array_shard, "_WRITTEN_BACK_BYTES", 4 * ROW_BYTES)
    rows = tuple(map(a_row, range(10)))

    arrays = open_arrays(tmp_path, RECIPE, rows, lambda rows: iter(expected(rows)))

    assert len(begun) == 2
    assert np.array_equal(all_of(arrays), expected(rows))
    assert np.array_equal(all_of(open_arrays(tmp_path, RECIPE, rows, lambda rows: iter(()))), expected(rows))


def test_a_file_with_withdrawn_contents_is_deleted(tmp_path: Path) -> None:
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS[:6], prepare)
    open_arrays(tmp_path, RECIPE, ROWS, prepare)
    open_arrays(tmp_path, "cd" * 32, ROWS[:6], prepare)
    prepare.asked.clear()
    present = {row.key for row in ROWS[1:]}

    arrays = open_arrays(tmp_path, RECIPE, ROWS[1:], prepare, present=present)

    assert prepare.asked == list(ROWS[1:6])
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS[1:]))
    assert all(ROWS[0].key.encode() not in path.read_bytes() for path in files(tmp_path))


def test_least_recently_used_files_go_first_when_the_limit_is_reached(tmp_path: Path) -> None:
    prepare = Preparing()
    for number, recipe in enumerate(("aa" * 32, "bb" * 32, "cc" * 32)):
        open_arrays(tmp_path, recipe, ROWS, prepare)
        (file,) = files(tmp_path / f"{recipe[:32]}-float32")
        os.utime(file, ns=(number, number))
    size = cache_bytes(tmp_path) // 3
    open_arrays(tmp_path, "aa" * 32, ROWS, prepare)  # used just now
    prepare.asked.clear()

    open_arrays(tmp_path, "dd" * 32, ROWS, prepare, max_bytes=3 * size)

    assert cache_bytes(tmp_path) <= 3 * size
    open_arrays(tmp_path, "aa" * 32, ROWS, prepare)
    open_arrays(tmp_path, "cc" * 32, ROWS, prepare)
    assert len(prepare.asked) == 12
    open_arrays(tmp_path, "bb" * 32, ROWS, prepare)
    assert len(prepare.asked) == 24


def test_eviction_does_not_disturb_who_reads(tmp_path: Path) -> None:
    arrays = open_arrays(tmp_path, RECIPE, ROWS, Preparing())
    size = cache_bytes(tmp_path)
    open_arrays(tmp_path, "cd" * 32, ROWS, Preparing(), max_bytes=size + 100)
    assert len(files(tmp_path)) == 1

    np.testing.assert_array_equal(all_of(arrays), expected(ROWS))


def test_a_cohort_above_the_limit_is_refused_before_it_is_prepared(tmp_path: Path) -> None:
    prepare = Preparing()

    with pytest.raises(CohortError, match="GB are permitted") as caught:
        open_arrays(tmp_path, RECIPE, ROWS, prepare, max_bytes=500)

    assert "cache_gb" in caught.value.remedy
    assert len(prepare.asked) == 1


def test_files_are_the_sites_alone(tmp_path: Path) -> None:
    open_arrays(tmp_path / "cache", RECIPE, ROWS, Preparing())

    found = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in found}
    assert modes == {True: 0o700, False: 0o600}


def test_a_full_disk_is_a_clear_error_and_what_was_there_stays(tmp_path: Path) -> None:
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS[:6], prepare)
    before = {path: path.read_bytes() for path in files(tmp_path)}

    with a_disk_of(1100), pytest.raises(CohortError, match="cannot be written") as caught:
        open_arrays(tmp_path, RECIPE, ROWS, prepare)

    assert "disk space" in caught.value.remedy
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    prepare.asked.clear()
    open_arrays(tmp_path, RECIPE, ROWS, prepare)
    assert prepare.asked == list(ROWS[6:])


def test_a_disk_that_is_full_for_real_is_a_clear_error(tmp_path: Path) -> None:
    """On a file system of 1 MB, in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$0" -m tests.client.test_array_cache "$1"'
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if "unshare" in ran.stderr or "mount:" in ran.stderr:
        do_without("this machine makes no mount namespaces")
    first, second, left = ran.stdout.splitlines()
    assert first.startswith("prepared images cannot be written to HOME/cache")
    assert "GB are free" in second
    assert left == "0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, CohortError])
def test_what_was_prepared_before_an_interruption_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(rows: Sequence[Row]) -> Iterator[Values]:
        yield from map(values_of, rows[:5])
        raise error("stop") if error is KeyboardInterrupt else CohortError("changed", remedy="wait")

    with pytest.raises(error):
        open_arrays(tmp_path, RECIPE, ROWS, interrupted)
    prepare = Preparing()
    open_arrays(tmp_path, RECIPE, ROWS, prepare)

    assert prepare.asked == list(ROWS[5:])


def test_arrays_of_different_shapes_are_a_fault_of_the_transform(tmp_path: Path) -> None:
    shapes = [(1, 4, 4), (1, 4, 5)]

    with pytest.raises(ValueError, match="like the first"):
        open_arrays(
            tmp_path, RECIPE, ROWS[:2], lambda rows: (np.zeros(shape, np.float32) for shape in shapes)
        )
    with pytest.raises(ValueError, match="expected float32"):
        open_arrays(
            tmp_path,
            "cd" * 32,
            ROWS[:2],
            lambda rows: (np.zeros(shape) for shape in shapes),  # type: ignore[misc]
        )


def test_purge_deletes_every_array_and_says_how_much(tmp_path: Path) -> None:
    assert purge_cache(tmp_path / "absent") == 0
    arrays = open_arrays(tmp_path, RECIPE, ROWS, Preparing())
    open_arrays(tmp_path, "cd" * 32, ROWS, Preparing())
    size = cache_bytes(tmp_path)

    assert purge_cache(tmp_path) == size > 2 * arrays.num_bytes

    assert files(tmp_path) == []
    np.testing.assert_array_equal(all_of(arrays), expected(ROWS))


# What follows runs in processes of its own, as `python -m tests.client.test_array_cache`.


def slowly(pause_s: float) -> array_cache.Prepare:
    def prepare(rows: Sequence[Row]) -> Iterator[Values]:
        for row in rows:
            time.sleep(pause_s)
            print("row", flush=True)
            yield values_of(row)

    return prepare


def a_process(folder: Path, *, pause_s: float, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.client.test_array_cache", str(folder), str(pause_s), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.splitlines()


def test_two_processes_prepare_each_row_once(tmp_path: Path) -> None:
    processes = [a_process(tmp_path, pause_s=0.02, count=40) for _ in range(2)]

    said = [end_of(process) for process in processes]

    assert sum(lines.count("row") for lines in said) == 40
    assert [lines[-1] for lines in said] == ["40 sound", "40 sound"]


def test_a_process_that_is_killed_loses_only_what_it_was_at(tmp_path: Path) -> None:
    process = a_process(tmp_path, pause_s=0.001, count=100_000)
    assert process.stdout is not None
    while len(finished(tmp_path)) < 3:
        assert process.stdout.readline() == "row\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(finished(tmp_path))

    again = end_of(a_process(tmp_path, pause_s=0, count=60))

    assert again[-1] == "60 sound"
    assert again.count("row") == max(0, 60 - 10 * kept)
    assert files(tmp_path) == finished(tmp_path)


def test_a_waiting_process_goes_on_when_the_other_is_killed(tmp_path: Path) -> None:
    first = a_process(tmp_path, pause_s=0.05, count=10_000)
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(CohortError, match="being prepared"):
        purge_cache(tmp_path)
    second = a_process(tmp_path, pause_s=0, count=12)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    assert end_of(second)[-1] == "12 sound"
    assert purge_cache(tmp_path) > 0


def forked(folder: Path, count: int) -> int:
    """Prepare rows in a copy of this process, ten to a file; it ends with 0 when they came out right."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            array_cache.SHARD_BYTES = 10 * ROW_BYTES
            rows = tuple(map(a_row, range(count)))
            arrays = open_arrays(folder, RECIPE, rows, pausing)
            code = 0 if np.array_equal(all_of(arrays), expected(rows)) else 7
        finally:
            os._exit(code)
    return pid


def pausing(rows: Sequence[Row]) -> Iterator[Values]:
    for row in rows:
        time.sleep(0.0005)
        yield values_of(row)


def test_processes_that_are_killed_at_any_moment_leave_nothing_wrong(tmp_path: Path) -> None:
    """Two at a time over the same growing cohort; the seed is fixed, the moments are the machine's."""
    chance = random.Random(7)
    for number in range(20):
        pids = [forked(tmp_path, 60 + number) for _ in range(2)]
        for pid in pids[: chance.randint(1, 2)]:
            time.sleep(chance.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
        assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids} <= {0, -signal.SIGKILL}
        assert all(open_shard(path) is not None for path in finished(tmp_path))

    assert os.waitstatus_to_exitcode(os.waitpid(forked(tmp_path, 80), 0)[1]) == 0
    assert files(tmp_path) == finished(tmp_path)


def test_a_clock_that_was_set_back_makes_no_shard_stay_for_ever(tmp_path: Path) -> None:
    old = open_arrays(tmp_path, "cd" * 32, ROWS, Preparing())
    for path in finished(tmp_path):
        os.utime(path, (2**33, 2**33))
    room = cache_bytes(tmp_path) + ROW_BYTES

    arrays = open_arrays(tmp_path, RECIPE, ROWS, Preparing(), max_bytes=room)

    assert cache_bytes(tmp_path) <= room
    np.testing.assert_array_equal(all_of(arrays), all_of(old))


def prepare_slowly(folder: Path, pause_s: float, count: int) -> None:
    """Prepare rows, ten to a file, saying "row" for each, and compare what comes out."""
    array_cache.SHARD_BYTES = 10 * ROW_BYTES
    rows = tuple(map(a_row, range(count)))
    arrays = open_arrays(folder, RECIPE, rows, slowly(pause_s))
    sound = np.array_equal(all_of(arrays), expected(rows))
    print(len(arrays.rows), "sound" if sound else "wrong", flush=True)


def fill_the_disk(folder: Path) -> None:
    """Prepare more than fits, once as if the disk filled up meanwhile."""
    free = shutil.disk_usage
    for believed in (lambda path: free(path)._replace(free=10**12), free):
        shutil.disk_usage = believed
        try:
            open_arrays(
                folder,
                RECIPE,
                tuple(map(a_row, range(200))),
                lambda rows: iter(np.ones((200, 1, 64, 64), "f4")),
            )
        except CohortError as error:
            print(error)
    print(len(files(folder)))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        fill_the_disk(Path(sys.argv[1]))
    else:
        prepare_slowly(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
