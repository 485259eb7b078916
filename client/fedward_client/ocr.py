"""Look for text in pictures with tesseract, where the operator has installed it: a sampling aid (hop 3).

Nothing found proves nothing: letters lower than about 14 pixels, handwriting and text on a bright ground
are often missed. What is found is worth a look. Pictures are enlarged, and bright letters are cut out of
them first: on the picture as it is, tesseract finds hardly anything (measured).

Only pixels go to tesseract, through a pipe; words come back and stay with the operator, for they may
name a patient.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedward_common.errors import UsageError

_TIMEOUT_S = 60
_SCALE = 3
_LONGEST_SIDE = 4096
"""Pixels of an enlarged picture; more would take minutes."""

_LEAST_CONFIDENCE = 60.0
"""Percent; noise in a radiograph comes out as letters at 20 to 50."""

_LEAST_LETTERS = 3


@dataclass(frozen=True)
class FoundWord:
    """One word that tesseract is sure of.

    Args:
        text: the word; may name a patient.
        confidence: percent.
        row: of its upper edge in the picture.
        column: of its left edge.
    """

    text: str = field(repr=False)
    confidence: float
    row: int
    column: int


def find_tesseract() -> str:
    """Path of the program.

    Raises:
        UsageError: it is not installed.
    """
    path = shutil.which("tesseract")
    if path is None:
        raise UsageError(
            "tesseract is not installed", remedy="Install it, on Debian: apt-get install tesseract-ocr"
        )
    return path


def find_text(picture: NDArray[np.uint8], tesseract: str) -> tuple[FoundWord, ...]:
    """Read a grey picture.

    Args:
        picture: `(rows, columns)`; the display's grey values.
        tesseract: from `find_tesseract`.

    Returns:
        words, each once, from top to bottom.

    Raises:
        UsageError: tesseract does not work, or takes longer than a minute.
    """
    rows, columns = picture.shape
    scale = max(1.0, min(_SCALE, _LONGEST_SIDE / max(rows, columns)))
    found: dict[str, FoundWord] = {}
    for variant in _VARIANTS:
        enlarged = _enlarged(variant(picture), scale)
        for word in _read(enlarged, scale, tesseract):
            found.setdefault(word.text.lower(), word)
    return tuple(sorted(found.values(), key=lambda word: (word.row, word.column)))


def _bright(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bright letters, black on white: what devices burn in."""
    return np.where(picture >= 230, np.uint8(0), np.uint8(255))


def _dark(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dark letters, on screens and scanned paper."""
    return np.where(picture <= 60, np.uint8(0), np.uint8(255))


def _inverted(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Letters of whatever brightness above their ground."""
    return 255 - picture


_VARIANTS: tuple[Callable[[NDArray[np.uint8]], NDArray[np.uint8]], ...] = (_bright, _dark, _inverted)


def _enlarged(picture: NDArray[np.uint8], scale: float) -> bytes:
    """The picture as a file of the plainest format there is."""
    image = Image.fromarray(picture)
    size = (round(image.width * scale), round(image.height * scale))
    file = BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "PPM")
    return file.getvalue()


def _read(image: bytes, scale: float, tesseract: str) -> list[FoundWord]:
    command = [tesseract, "stdin", "stdout", "--psm", "11", "tsv"]
    try:
        done = subprocess.run(
            command,
            input=image,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            env=os.environ | {"OMP_THREAD_LIMIT": "1"},
        )
    except (subprocess.SubprocessError, OSError):
        raise UsageError(
            "tesseract failed, or took longer than a minute",
            remedy="Try it by hand: tesseract --list-langs has to name eng.",
        ) from None
    header, *lines = done.stdout.decode("utf-8", "replace").splitlines()
    names = header.split("\t")
    words = []
    for line in lines:
        cells = dict(zip(names, line.split("\t"), strict=False))
        text = "".join(letter for letter in cells.get("text", "") if letter.isalnum())
        if len(text) >= _LEAST_LETTERS and float(cells["conf"]) >= _LEAST_CONFIDENCE:
            place = (int(int(cells[name]) / scale) for name in ("top", "left"))
            words.append(FoundWord(cells["text"].strip(), float(cells["conf"]), *place))
    return words
