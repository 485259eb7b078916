"""Pixels on their way from a decoder process to the site: memory that both see, used again (hop 2).

A fresh page costs the system more than a decoder takes to fill it, so each decoder process keeps a few
pieces of memory and the site maps each of them once. The site says with every request which piece is
free; the answer's arrays lie in it, one behind the other, and are copied, or lent until nobody holds a
view of any of them any more.

The decoder may have been taken over by an image. A piece is mapped only when its size is sealed, and an
array is made only within it. What the decoder can still do is change the values of an array that is
lent: one that was copied holds still, one that was lent is for arithmetic that reads it once.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.sandbox_wire import DEPTH, WireError

MEMORIES = DEPTH + 3
"""Pieces of memory of one process: one for each request at hand, the others can be lent."""

_KEPT_BYTES = 12 * 2**20
"""The largest piece that is used again; a radiograph of 1760 x 1760 fits."""

PIECE_BYTES = 4 * 2**20
"""The smallest piece: four CT slices. More would not stay in the processor's cache on their way."""

_ALIGNMENT = 64

_DTYPES = ("float32", "uint8", "int8", "uint16", "int16", "uint32", "int32")
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4
SEALS = _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL
"""Memory that can no longer change its size, so that reading it is no crash."""


def lend_file(pixels: NDArray[Any]) -> int:
    """Put an array into memory that a decoder process can be handed as an open file.

    Args:
        pixels: of any shape; its bytes in C order are what is there.

    Returns:
        the file's descriptor, which the caller closes.

    Raises:
        OSError: there is no memory, or no more open files.
    """
    file = os.memfd_create("given", os.MFD_CLOEXEC)
    try:
        with open(file, "wb", buffering=0, closefd=False) as memory:
            left = np.ascontiguousarray(pixels).data.cast("B")
            while left:
                left = left[memory.write(left) :]
    except BaseException:
        os.close(file)
        raise
    return file


def borrowed(file: int, shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """Map what `lend_file` made, on the decoder's side.

    Args:
        file: descriptor; it may be closed afterwards.
        shape: of the array that was lent.
        dtype: its NumPy name.

    Returns:
        that array, of `shape`, for reading only.

    Raises:
        MemoryError: this process may not have so much.
    """
    try:
        mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except OSError:
        raise MemoryError from None
    return np.frombuffer(mapped, dtype).reshape(shape)


class SharedArray:
    """One piece, on the decoder's side; it holds the arrays of one request.

    Args:
        make_room: called before memory is made that will not be kept.

    Attributes:
        file: of the piece, -1 while there is none.
        is_full: the file at hand asked for more than there is beside the arrays of others. It is for
            another request, whatever its decoder makes of the `MemoryError`.
    """

    def __init__(self, make_room: Callable[[], None] = lambda: None) -> None:
        self.file = -1
        self.is_full = False
        self._make_room = make_room
        self._is_new = False
        self._size = 0
        self._kept = self._start = self._end = 0  # bytes; of files that are done, and of the one at hand
        self._map: mmap.mmap | None = None

    @property
    def holds_array(self) -> bool:
        """Whether there is one since the last `release`."""
        return self._end > 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make the array of the file at hand; `numpy.empty`'s signature, for `decode_frames`.

        Raises:
            MemoryError: this process may not have so much, or see `is_full`.
        """
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        start = -(-self._kept // _ALIGNMENT) * _ALIGNMENT
        if self._map is None or start + size > self._size:
            if self._kept:
                self.is_full = True
                raise MemoryError
            self.close()
            if size > _KEPT_BYTES:
                self._make_room()
            self._make(max(size, PIECE_BYTES))
        self._start, self._end = start, start + size
        assert self._map is not None
        return np.frombuffer(self._map, dtype, count, start).reshape(shape)

    def keep(self) -> int:
        """The file at hand is done: say where its array begins, and leave that alone."""
        self._kept = self._end
        return self._start

    def drop(self) -> None:
        """The file at hand is refused: its array may be written over."""
        self._end = self._kept
        if not self._kept:
            self.release()

    def _make(self, size: int) -> None:
        self.file = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, size)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, SEALS)
            self._map = mmap.mmap(self.file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:  # the system says ENOMEM or EFBIG
            raise MemoryError from None
        self._size, self._is_new = size, True

    def unsent(self) -> list[int]:
        """The file, once, when there is an array in memory that the site has not seen yet."""
        if not (self._kept and self._is_new):
            return []
        self._is_new = False
        return [self.file]

    def release(self) -> None:
        """Be done with the arrays; memory for a large one is given back."""
        self._kept = self._start = self._end = 0
        self.is_full = False
        if self._size > _KEPT_BYTES:
            self.close()

    def close(self) -> None:
        """Give this side's memory back; arrays made of it keep theirs until they go."""
        if self.file >= 0:
            os.close(self.file)
        self.file, self._size, self._map = -1, 0, None
        self._kept = self._start = self._end = 0


class Memories:
    """All pieces of one decoder process, on the site's side."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap | None] = [None] * MEMORIES
        self._free = list(range(MEMORIES))  # the last one is in the processor's cache
        self._lent: dict[int, NDArray[np.uint8] | None] = {}  # all of a piece while answers are read from it
        self._num_reserved = 0

    def reserve(self) -> int:
        """Take a free piece for a request, of which there are at most `DEPTH`."""
        number = self._free.pop()
        self._num_reserved += 1
        self._lent.pop(number, None)
        return number

    def renew(self, number: int, file: int) -> None:
        """Map the memory that a piece has from now on; the file is the caller's to close.

        Raises:
            WireError: it could still shrink, which would be a crash, or is no such memory.
        """
        try:
            sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & (_F_SEAL_SHRINK | _F_SEAL_SEAL)
            if sealed != _F_SEAL_SHRINK | _F_SEAL_SEAL:
                raise WireError
            size = os.fstat(file).st_size
            at_once = mmap.MAP_POPULATE if size <= _KEPT_BYTES else 0
            self._maps[number] = mmap.mmap(file, size, mmap.MAP_SHARED | at_once)
        except (OSError, ValueError):
            raise WireError from None

    def array(
        self, number: int, shape: Sequence[int], dtype: str, start: int = 0, *, lend: bool
    ) -> NDArray[Any]:
        """Copy or lend an array that an answer has in a piece.

        Args:
            number: of the piece, reserved.
            shape: as announced.
            dtype: as announced.
            start: its first byte, as announced.
            lend: the piece stays taken until all views of its arrays are gone. When few pieces are left
                the array is copied all the same.

        Raises:
            WireError: there cannot be such an array in it.
        """
        mapped = self._maps[number]
        if dtype not in _DTYPES or not 2 <= len(shape) <= 4 or not all(1 <= side < 2**31 for side in shape):
            raise WireError
        sides = [int(side) for side in shape]
        size = int(np.prod(sides, dtype=object)) * np.dtype(dtype).itemsize
        if not isinstance(start, int) or start < 0 or start % _ALIGNMENT:
            raise WireError
        if mapped is None or len(mapped) < start + size:
            raise WireError
        if len(mapped) > _KEPT_BYTES:  # the decoder does not keep it either
            self._maps[number] = None
        held = self._lent.get(number)
        whole = np.frombuffer(mapped, np.uint8) if held is None else held
        values = whole[start : start + size].view(dtype).reshape(sides)
        if held is None:
            if not lend or len(self._free) + self._num_reserved <= DEPTH:
                return values.copy()
            self._lent[number] = whole
            # Views of views hold on to `whole` as well. The list outlives this object if it must.
            weakref.finalize(whole, self._free.append, number).atexit = False
        return values

    def settle(self, number: int) -> None:
        """The request has its answer: its piece is free again, unless it was lent."""
        self._num_reserved -= 1
        if number in self._lent:
            self._lent[number] = None
        else:
            self._free.append(number)
