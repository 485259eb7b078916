"""Prepared arrays on disk, so that a case is decoded once and read by mapping ever after (hop 4).

HOME/cache holds one folder for each recipe (everything but the case that decides how an array comes
out) and in it shards: safetensors files with many rows each, which say themselves what their rows are.
What is promised:

- A shard appears whole or not at all: it is written beside its place, synced, and renamed. A process
  that is killed loses the shard at hand and nothing else; the next one goes on from there.
- One process prepares at a time; others wait for it and then find what it made. Readers never wait.
  A mapping stays good when its file is deleted, so nobody is disturbed by eviction.
- All shards together stay below a limit; the least recently used go first.
- A shard with a row whose file is no longer at the site goes as a whole: what an operator withdrew is
  not kept.

Images are kept as float32, to the last bit what they were. Volumes are kept as int16 steps of
`STEP = 1 / 32767` over [-1, 1]: half the disk and page cache for an error of at most half a step,
1.53e-5, a sixty-fourth of the step between the grey levels of a 12-bit detector (4.9e-4).

Files are mode 0600 and may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedward_client.array_shard import ENDING, Kind, Row, Shard, ShardWriter, encoded, open_shard
from fedward_common.errors import CohortError

Values = NDArray[np.float32]
Prepare = Callable[[Sequence[Row]], Iterator[Values | None]]

SHARD_BYTES = 256 * 2**20
"""Large enough that a cohort needs few mappings, small enough that little is lost when one is cut off."""

_LOCK = "lock"
_DRAFT = ".draft-"
_MOST_SMALL_SHARDS = 16


class StoredArrays:
    """Rows of one cohort, read from their mappings when they are asked for.

    Attributes:
        rows: what each row is, in order.
        shape: `(rows, *shape of a row)`.
    """

    def __init__(self, rows: Sequence[Row], shards: Sequence[Shard]) -> None:
        self.rows = tuple(rows)
        self._shards = tuple(shards)
        place_of = {
            key: (number, place)
            for number, shard in enumerate(self._shards)
            for place, key in enumerate(shard.keys)
        }
        self._places = [place_of[row.key] for row in self.rows]
        self.shape: tuple[int, ...] = (len(self.rows), *self._shards[0].values.shape[1:])

    @property
    def num_bytes(self) -> int:
        """What all rows take as float32."""
        return int(np.prod(self.shape, dtype=np.int64)) * 4

    def take(self, numbers: Sequence[int]) -> Values:
        """Copy rows into memory: float32 `(len(numbers), *shape of a row)`."""
        taken = np.empty((len(numbers), *self.shape[1:]), np.float32)
        for slot, number in zip(taken, numbers, strict=True):
            shard, place = self._places[number]
            self._shards[shard].read(place, slot)
        return taken

    def will_need(self, numbers: Sequence[int]) -> None:
        """Tell the operating system which rows come next; it reads them from disk meanwhile."""
        for number in numbers:
            shard, place = self._places[number]
            self._shards[shard].will_need(place)


def open_arrays(
    folder: Path,
    recipe: str,
    rows: Sequence[Row],
    prepare: Prepare,
    *,
    kind: Kind = "float32",
    max_bytes: int = 50 * 10**9,
    present: Collection[str] | None = None,
) -> StoredArrays:
    """Map the prepared arrays of these rows, preparing only those not met before.

    Args:
        folder: HOME/cache; made with mode 0700 when absent.
        recipe: hex digest of everything but the row that decides how an array comes out.
        rows: in the order wanted, no key twice.
        prepare: gives for each of some rows, in their order, its float32 array, the same shape for all
            and for "int16" within [-1, 1]; None when it cannot be used.
        kind: how values are kept; see the module.
        max_bytes: of all recipes together.
        present: contents that the site still has; None keeps every shard.

    Returns:
        The rows that were not refused.

    Raises:
        CohortError: the disk is full or not writable, the limit is too low for these rows, or every
            row was refused.
    """
    store = folder / f"{recipe[:32]}-{kind}"
    shards = _covering(_shards_in(store), rows, present)
    if shards is None:
        try:
            with _lock(folder):
                return _Builder(folder, store, kind, max_bytes).run(rows, prepare, present)
        except OSError as error:
            raise CohortError(
                "prepared images cannot be written to HOME/cache",
                remedy="Free disk space, or make HOME writable for this user.",
            ) from error
    _touch(shards)
    return StoredArrays(rows, shards)


def purge_cache(folder: Path) -> int:
    """Delete every prepared array.

    Args:
        folder: HOME/cache; need not exist.

    Returns:
        Bytes freed.

    Raises:
        CohortError: another process is preparing arrays, or files cannot be deleted.
    """
    if folder.is_symlink() or not folder.is_dir():
        return 0
    try:
        with _lock(folder, wait=False):
            freed = cache_bytes(folder)
            for store in _stores(folder):
                shutil.rmtree(store)
    except BlockingIOError as error:
        raise CohortError(
            "images are being prepared at this moment", remedy="Stop the training or wait, then purge again."
        ) from error
    except OSError as error:
        raise CohortError(
            "HOME/cache cannot be deleted", remedy="Make HOME/cache writable for this user."
        ) from error
    return freed


def cache_bytes(folder: Path) -> int:
    """Size of all prepared arrays of a site."""
    return sum(_size(path) for store in _stores(folder) for path in store.iterdir())


class _Builder:
    """Prepares what is missing; exists only under the lock."""

    def __init__(self, folder: Path, store: Path, kind: Kind, max_bytes: int) -> None:
        self._folder, self._store, self._kind, self._max_bytes = folder, store, kind, max_bytes

    def run(self, rows: Sequence[Row], prepare: Prepare, present: Collection[str] | None) -> StoredArrays:
        self._clean(present)
        found = _shards_in(self._store)
        known = {key for shard in found for key in shard.keys}
        missing = [row for row in rows if row.key not in known]
        used = [shard for shard in found if not {row.key for row in rows}.isdisjoint(shard.keys)]
        _touch(used)
        small = [shard for shard in used if shard.num_bytes < SHARD_BYTES // 4]
        merged = small if len(small) > _MOST_SMALL_SHARDS else []
        made = self._write(merged, missing, prepare, used) if missing or merged else []
        for shard in merged:
            shard.path.unlink(missing_ok=True)
        shards = [shard for shard in used if shard not in merged] + made
        known = {key for shard in shards for key in shard.keys}
        kept = [row for row in rows if row.key in known]
        if not kept:
            raise CohortError(
                "no image can be decoded",
                remedy="See what is in quarantine and why: fedward-site cohort quarantine",
            )
        return StoredArrays(kept, shards)

    def _clean(self, present: Collection[str] | None) -> None:
        """Delete what killed processes left, what is damaged, and what was withdrawn."""
        self._store.mkdir(mode=0o700, exist_ok=True)
        for stray in self._folder.iterdir():  # an earlier version kept its files here
            if stray.is_file() and stray.name != _LOCK:
                stray.unlink()
        for store in _stores(self._folder):
            for path in store.iterdir():
                shard = open_shard(path) if path.suffix == ENDING else None
                if shard is None or (present is not None and _withdrawn(shard, present)):
                    path.unlink()
            if store != self._store:
                with suppress(OSError):  # not empty
                    store.rmdir()

    def _write(
        self, merged: Sequence[Shard], missing: Sequence[Row], prepare: Prepare, used: Sequence[Shard]
    ) -> list[Shard]:
        """Write rows one after the other, so that a full disk is an error and not a crash of a mapping."""
        made: list[Shard] = []
        writer: ShardWriter | None = None
        roomy = False
        try:
            for row, values in self._stored(merged, missing, prepare):
                if not roomy:
                    self._make_room((len(missing) + 1) * values.nbytes, used)
                    roomy = True
                if writer is None:
                    writer = ShardWriter(self._store, _DRAFT, self._kind, values.shape)
                writer.add(row, values)
                if writer.num_bytes >= SHARD_BYTES:
                    made.append(writer.publish())
                    writer = None
            if writer is not None:
                made.append(writer.publish())
        except OSError:
            if writer is not None:
                writer.discard()
            raise
        except BaseException:  # what was prepared until now need not be prepared again
            if writer is not None:
                with suppress(OSError):
                    writer.publish()
                writer.discard()
            raise
        return made

    def _stored(
        self, merged: Sequence[Shard], missing: Sequence[Row], prepare: Prepare
    ) -> Iterator[tuple[Row, NDArray[np.float32] | NDArray[np.int16]]]:
        for shard in merged:
            yield from zip(shard.rows, shard.values, strict=True)
        if missing:
            for row, values in zip(missing, prepare(missing), strict=True):
                if values is not None:
                    yield row, encoded(values, self._kind)

    def _make_room(self, num_bytes: int, used: Sequence[Shard]) -> None:
        """Evict the least recently used shards of others until so many bytes fit below the limit."""
        in_use = {shard.path for shard in used}
        needed = num_bytes + sum(shard.num_bytes for shard in used)
        if needed > self._max_bytes:
            raise CohortError(
                f"the prepared images of this cohort take about {needed / 1e9:.1f} GB;"
                f" {self._max_bytes / 1e9:.1f} GB are permitted",
                remedy="Raise cache_gb in HOME/cohort.toml, or ask the coordinator for a smaller"
                " transforms.size.",
            )
        paths = [path for store in _stores(self._folder) for path in store.glob(f"*{ENDING}")]
        total = sum(map(_size, paths))
        for path in sorted(set(paths) - in_use, key=_last_used):
            if total + num_bytes <= self._max_bytes:
                break
            total -= _size(path)
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes:
            raise CohortError(
                f"prepared images need {num_bytes / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free",
                remedy="Free disk space on the disk that holds HOME.",
            )


def _covering(
    shards: Sequence[Shard], rows: Sequence[Row], present: Collection[str] | None
) -> list[Shard] | None:
    """The shards that hold all rows, or None when something has to be prepared or tidied first."""
    wanted = {row.key for row in rows}
    used = [shard for shard in shards if not wanted.isdisjoint(shard.keys)]
    held = {key for shard in used for key in shard.keys}
    withdrawn = present is not None and any(_withdrawn(shard, present) for shard in shards)
    small = sum(shard.num_bytes < SHARD_BYTES // 4 for shard in used)
    return used if rows and wanted <= held and not withdrawn and small <= _MOST_SMALL_SHARDS else None


def _withdrawn(shard: Shard, present: Collection[str]) -> bool:
    return any(content not in present for row in shard.rows for content in row.contents)


def _shards_in(store: Path) -> list[Shard]:
    opened = (open_shard(path) for path in sorted(store.glob(f"*{ENDING}")))
    return [shard for shard in opened if shard is not None]


def _stores(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]


def _touch(shards: Sequence[Shard]) -> None:
    for shard in shards:
        with suppress(OSError):  # evicted meanwhile, or a file system that cannot be written
            os.utime(shard.path)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _last_used(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


@contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only process that writes here; the lock ends with the process, however it ends."""
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
