"""Expand PALETTE COLOR indices to RGB, as a viewer would (hop 2).

A segmented table is a little program of runs and ramps; it is carried out up to the number of entries
that the table announces, and one that would run on is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.display import LookUpTable, read_table, stored_ends
from fedward_client.dicom.elements import Elements
from fedward_client.dicom.header import Header
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.values import is_present

_COLOURS = ("Red", "Green", "Blue")
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


def read_palette(elements: Elements, header: Header) -> tuple[LookUpTable, LookUpTable, LookUpTable]:
    """Read the three tables; call it inside `contained`.

    Raises:
        UnusableImageError: absent or malformed.
    """
    red, green, blue = (_read_colour(elements, colour, header) for colour in _COLOURS)
    return red, green, blue


def _read_colour(elements: Elements, colour: str, header: Header) -> LookUpTable:
    descriptor = f"{colour}PaletteColorLookupTableDescriptor"
    segmented = f"Segmented{colour}PaletteColorLookupTableData"
    ends = stored_ends(header)
    if not is_present(elements, segmented):
        return read_table(elements, descriptor, f"{colour}PaletteColorLookupTableData", ends)
    program = read_table(elements, descriptor, segmented, ends, whole=False)
    entries = expand_segments(program.entries.tolist(), program.num_entries, words=program.bits > 8)
    return replace(program, entries=np.array(entries, dtype=np.uint16))


def expand_segments(program: list[int], num_entries: int, *, words: bool = True) -> list[int]:
    """Carry out a segmented table's runs (discrete), ramps (linear) and repetitions (indirect).

    Args:
        program: numbers of the segments.
        num_entries: announced; a program that would yield more is refused there.
        words: the numbers are words, and so an offset is two of them; else bytes, and it is four.

    Raises:
        UnusableImageError: another number of entries than announced, or a segment of another kind.

    Source: DICOM PS3.3 C.7.9.2; an offset counts bytes from the program's beginning.

    >>> expand_segments([0, 2, 10, 20, 1, 4, 60], 6)
    [10, 20, 30, 40, 50, 60]
    >>> expand_segments([0, 1, 5, 1, 2, 9, 2, 1, 6, 0], 5)
    [5, 7, 9, 9, 9]
    """
    entries: list[int] = []
    position = repeated = 0
    back = -1
    while position + 2 < len(program) and len(entries) < num_entries:
        kind, length = program[position], program[position + 1]
        if kind == _DISCRETE:
            entries += program[position + 2 : position + 2 + length]
            position += 2 + length
        elif kind == _LINEAR and entries and length:
            start, end = entries[-1], program[position + 2]
            entries += [round(start + (end - start) * step / length) for step in range(1, length + 1)]
            position += 3
        elif kind == _INDIRECT and not repeated and length:  # of segments that are none themselves
            back, repeated = position + (4 if words else 6), length + 1
            position = _offset(program, position + 2, words=words)
        else:
            raise UnusableImageError(Reason.PHOTOMETRIC)
        repeated -= 1 if repeated else 0
        if back >= 0 and not repeated:
            position, back = back, -1
    if len(entries) != num_entries:
        raise UnusableImageError(Reason.PHOTOMETRIC)
    return entries


def _offset(program: list[int], position: int, *, words: bool) -> int:
    """Number of the program at which an indirect segment's repetition begins; least part first."""
    parts = program[position : position + (2 if words else 4)]
    width = 2 if words else 1
    offset = sum(part << (8 * width * place) for place, part in enumerate(parts))
    if offset % width or offset // width >= position - 2:  # only what has been carried out already
        raise UnusableImageError(Reason.PHOTOMETRIC)
    return offset // width


def byte_tables(
    palette: tuple[LookUpTable, LookUpTable, LookUpTable],
) -> tuple[NDArray[np.uint8], int]:
    """Entries as bytes, and the index that the first of them stands for.

    Returns:
        uint8 `(entries, 3)`, first mapped index.

    Entries of 16 bits keep their upper byte; where no colour of the palette has anything there, the
    writer put bytes into words and the lower byte is meant.
    """
    if len({(len(table.entries), table.first_mapped, table.bits) for table in palette}) > 1:
        raise UnusableImageError(Reason.PHOTOMETRIC)
    entries: NDArray[np.integer] = np.stack([table.entries for table in palette], axis=1)
    if entries.max() > 255:  # beyond 8 bits whatever the descriptor says
        entries = entries >> (8 if palette[0].bits == 8 else palette[0].bits - 8)
    return entries.astype(np.uint8), palette[0].first_mapped


def expand(indices: NDArray[np.integer], tables: NDArray[np.uint8], first: int) -> NDArray[np.uint8]:
    """Look up `(rows, columns)` indices; those outside the table take its nearest entry.

    Returns:
        uint8 `(rows, columns, 3)`.
    """
    places = np.clip(indices.astype(np.int64) - first, 0, len(tables) - 1)
    found: NDArray[np.uint8] = tables[places]
    return found
