"""Pixels on their way from a decoder process to the site: memory that both see, used again (hop 2).

A fresh page costs the system more than a decoder takes to fill it, so each decoder process keeps a few
pieces of memory and the site maps each of them once. The site says with every request which piece is
free; the answer's array lies in it and is copied, or lent until nobody holds a view of it any more.

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

_DTYPES = ("float32", "uint8", "int8", "uint16", "int16", "uint32", "int32")
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


class SharedArray:
    """One piece, on the decoder's side; it holds one array at a time.

    Args:
        make_room: called before memory is made that will not be kept.

    Attributes:
        file: of the piece, -1 while there is none.
        holds_array: since the last `release`.
    """

    def __init__(self, make_room: Callable[[], None] = lambda: None) -> None:
        self.file = -1
        self.holds_array = False
        self._make_room = make_room
        self._is_new = False
        self._size = 0
        self._map: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make the array; `numpy.empty`'s signature, for `decode_frames`.

        Raises:
            MemoryError: this process may not have so much.
        """
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        if self._map is None or size > self._size:
            self.close()
            if size > _KEPT_BYTES:
                self._make_room()
            self._make(size)
        self.holds_array = True
        assert self._map is not None
        return np.frombuffer(self._map, dtype, count).reshape(shape)

    def _make(self, size: int) -> None:
        self.file = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, size)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
            self._map = mmap.mmap(self.file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:  # the system says ENOMEM or EFBIG
            raise MemoryError from None
        self._size, self._is_new = size, True

    def unsent(self) -> list[int]:
        """The file, once, when there is an array in memory that the site has not seen yet."""
        if not (self.holds_array and self._is_new):
            return []
        self._is_new = False
        return [self.file]

    def release(self) -> None:
        """Be done with the array; memory for a large one is given back."""
        self.holds_array = False
        if self._size > _KEPT_BYTES:
            self.close()

    def close(self) -> None:
        """Give this side's memory back; arrays made of it keep theirs until they go."""
        if self.file >= 0:
            os.close(self.file)
        self.file, self.holds_array, self._size, self._map = -1, False, 0, None


class Memories:
    """All pieces of one decoder process, on the site's side."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap | None] = [None] * MEMORIES
        self._free = list(range(MEMORIES))  # the last one is in the processor's cache
        self._lent: set[int] = set()
        self._num_reserved = 0

    def reserve(self) -> int:
        """Take a free piece for a request, of which there are at most `DEPTH`."""
        number = self._free.pop()
        self._num_reserved += 1
        self._lent.discard(number)
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

    def array(self, number: int, shape: Sequence[int], dtype: str, *, lend: bool) -> NDArray[Any]:
        """Copy or lend the array that an answer has in a piece.

        Args:
            number: of the piece, reserved.
            shape: as announced.
            dtype: as announced.
            lend: the piece stays taken until all views of the array are gone. When few are left it is
                copied all the same.

        Raises:
            WireError: there cannot be such an array in it.
        """
        mapped = self._maps[number]
        if dtype not in _DTYPES or not 2 <= len(shape) <= 4 or not all(1 <= side < 2**31 for side in shape):
            raise WireError
        sides = [int(side) for side in shape]
        size = int(np.prod(sides, dtype=object)) * np.dtype(dtype).itemsize
        if mapped is None or len(mapped) < size:
            raise WireError
        if len(mapped) > _KEPT_BYTES:  # the decoder does not keep it either
            self._maps[number] = None
        held = np.frombuffer(mapped, np.uint8, size)
        values = held.view(dtype).reshape(sides)
        if not lend or len(self._free) + self._num_reserved <= DEPTH:
            return values.copy()
        self._lent.add(number)
        # Views of views hold on to `held` as well. The list outlives this object if it must.
        weakref.finalize(held, self._free.append, number).atexit = False
        return values

    def settle(self, number: int) -> None:
        """The request has its answer: its piece is free again, unless it was lent."""
        self._num_reserved -= 1
        if number not in self._lent:
            self._free.append(number)
