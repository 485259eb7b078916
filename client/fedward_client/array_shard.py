"""One file of prepared arrays: many rows of one shape, and what each row is (hop 4).

The format is safetensors, so that it can be looked at with public tools and holds no code: a tensor
"values" `(rows, *shape)` and, after it, the listing of the rows as JSON bytes. The header is padded to
a fixed length: rows are appended as they come and the header is filled in last. See `array_cache.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["float32", "int16"]
Stored = NDArray[np.float32] | NDArray[np.int16]

ENDING = ".safetensors"
STEP = np.float32(1 / 32767)
"""What one unit of an int16 row is worth."""

_HEADER_BYTES = 1024
_WRITTEN_BACK_BYTES = 16 * 2**20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_CODE: dict[Kind, str] = {"float32": "F32", "int16": "I16"}
_DTYPE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I16": np.dtype("<i2")}


@dataclass(frozen=True)
class Row:
    """What one row is.

    Args:
        key: hex digest of its files and of what is done to this case alone, such as a mask.
        contents: SHA-256 (hex) of the files that it comes from.
    """

    key: str
    contents: tuple[str, ...] = field(repr=False)


class Shard:
    """A mapped file.

    Attributes:
        path: where it lay when it was opened; it may be gone.
        rows: what each row is.
        keys: their keys.
        values: `(rows, *shape)`, as kept, not writable.
    """

    def __init__(self, path: Path, rows: tuple[Row, ...], values: Stored, mapping: mmap.mmap) -> None:
        self.path, self.rows, self.values, self._mapping = path, rows, values, mapping
        self.keys = tuple(row.key for row in rows)
        self._row_bytes = values[0].nbytes

    @property
    def num_bytes(self) -> int:
        """Size of all values as kept."""
        return self.values.nbytes

    def read(self, place: int, out: NDArray[np.float32]) -> None:
        """Write one row into `out`, as float32."""
        if self.values.dtype == np.float32:
            out[...] = self.values[place]
        else:
            np.multiply(self.values[place], STEP, out=out)

    def will_need(self, place: int) -> None:
        """Have one row read from disk in the background."""
        start = _HEADER_BYTES + place * self._row_bytes
        page = start - start % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_WILLNEED, page, start + self._row_bytes - page)


def encoded(values: NDArray[np.float32], kind: Kind) -> Stored:
    """Bring an array to how it is kept.

    Raises:
        ValueError: not float32, or for "int16" not within [-1, 1]: the transform is at fault.
    """
    if values.dtype != np.float32:
        raise ValueError(f"prepared array {values.dtype}, expected float32")
    if kind == "float32":
        return values
    if not (np.abs(values) <= 1).all():
        raise ValueError("prepared array outside of -1 to 1")
    steps: NDArray[np.int16] = np.rint(values * np.float32(32767)).astype(np.int16)
    return steps


class ShardWriter:
    """Writes a shard beside its place; nobody sees it before `publish`."""

    def __init__(self, store: Path, prefix: str, kind: Kind, shape: tuple[int, ...]) -> None:
        self._store, self._kind, self._shape = store, kind, shape
        self._rows: list[Row] = []
        self.num_bytes = 0
        self._on_its_way = 0
        self._draft = store / f"{prefix}{secrets.token_hex(8)}"
        descriptor = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "w+b")
        self._file.write(b"\0" * _HEADER_BYTES)  # no valid header until all is written

    def add(self, row: Row, values: Stored) -> None:
        """Append a row.

        Raises:
            OSError: no room on the disk.
            ValueError: another shape than the first: the transform is at fault.
        """
        if values.shape != self._shape:
            raise ValueError(f"prepared array {values.shape}, expected {self._shape} like the first")
        written = np.ascontiguousarray(values, dtype=_DTYPE[_CODE[self._kind]])
        self._file.write(written.data)
        self._rows.append(row)
        self.num_bytes += written.nbytes
        if self.num_bytes - self._on_its_way >= _WRITTEN_BACK_BYTES:
            _write_back(self._file.fileno())
            self._on_its_way = self.num_bytes

    def publish(self) -> Shard:
        """Put the file in its place, under a name that follows from its rows.

        Raises:
            OSError: no room on the disk.
        """
        listing = json.dumps([[row.key, *row.contents] for row in self._rows]).encode()
        self._file.write(listing)
        self._file.seek(0)
        self._file.write(self._header(len(listing)))
        self._file.flush()
        os.fsync(self._file.fileno())
        name = hashlib.sha256(" ".join(row.key for row in self._rows).encode()).hexdigest()
        path = self._store / f"{name[:32]}{ENDING}"
        shard = _mapped(path, self._file.fileno())  # before it can be deleted by others
        self._file.close()
        self._draft.replace(path)
        return shard

    def discard(self) -> None:
        """Delete what was written, unless it was published."""
        with suppress(OSError):  # what could not be flushed
            self._file.close()
        self._draft.unlink(missing_ok=True)

    def _header(self, listing_bytes: int) -> bytes:
        end = self.num_bytes
        header = {
            "values": {
                "dtype": _CODE[self._kind],
                "shape": [len(self._rows), *self._shape],
                "data_offsets": [0, end],
            },
            "rows": {"dtype": "U8", "shape": [listing_bytes], "data_offsets": [end, end + listing_bytes]},
        }
        text = json.dumps(header).encode().ljust(_HEADER_BYTES - 8)
        return len(text).to_bytes(8, "little") + text


def _write_back(file: int) -> None:
    """Let the disk begin with what there is, so that `publish` waits for the rest alone."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None:  # glibc on Linux; others do without
        start(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def open_shard(path: Path) -> Shard | None:
    """Map a shard; None when it is absent, damaged or not one of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _mapped(path, descriptor)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    finally:
        os.close(descriptor)


def _mapped(path: Path, descriptor: int) -> Shard:
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8:_HEADER_BYTES])
    values, listing = header["values"], header["rows"]
    dtype, shape = _DTYPE[values["dtype"]], tuple(map(int, values["shape"]))
    end, last = map(int, listing["data_offsets"])
    whole = length == _HEADER_BYTES - 8 and len(mapping) == _HEADER_BYTES + last
    if not whole or len(shape) < 2 or min(shape) < 1 or int(np.prod(shape)) * dtype.itemsize != end:
        raise ValueError("the header contradicts the file")
    rows = tuple(
        Row(str(key), tuple(map(str, contents)))
        for key, *contents in json.loads(mapping[_HEADER_BYTES + end :])
    )
    if len(rows) != shape[0]:
        raise ValueError("rows and their listing differ in number")
    mapped: Stored = np.frombuffer(mapping, dtype, int(np.prod(shape)), _HEADER_BYTES).reshape(shape)
    return Shard(path, rows, mapped, mapping)
