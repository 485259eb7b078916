"""Prepared images on disk, so that a site's second start decodes nothing.

One `.npy` file of float32 rows for each way of preparing images (its key names transforms and
decoders), mapped into memory rather than read. Rows of images that were prepared before are taken
over when the cohort changes. Written beside the old file and put in its place in one step; the file
is the site's own, mode 0600, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import CohortError
from fedward_common.files import write_atomically

Images = NDArray[np.float32]


def cached_images(
    folder: Path, recipe: str, contents: Sequence[str], prepare: Callable[[str], Images | None]
) -> tuple[Images, tuple[str, ...]]:
    """Return the prepared images of these contents, preparing only those not met before.

    Args:
        folder: made with mode 0700 when absent.
        recipe: hex digest of everything but the content that decides how an image comes out.
        contents: SHA-256 (hex) of each file, in the order wanted.
        prepare: content -> float32 array, the same shape for all; None when it cannot be used.

    Returns:
        `(cases, *shape)`, copy-on-write, and the contents of its rows: those not refused, in order.

    Raises:
        CohortError: the disk is full or not writable, or every content was refused.
    """
    cached = _load(folder, recipe, contents)
    if cached is not None:
        return cached, tuple(contents)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        draft = folder / f".{secrets.token_hex(8)}"
        try:
            kept = _write(draft, contents, _rows_before(folder, recipe), prepare)
            _publish(draft, folder, recipe, kept)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise CohortError(
            "prepared images cannot be written to HOME/cache",
            remedy="Free disk space, or make HOME writable for this user.",
        ) from error
    fresh = _load(folder, recipe, kept)
    if fresh is None:
        raise CohortError(
            "prepared images cannot be read back from HOME/cache", remedy="Check the disk of HOME for faults."
        )
    return fresh, kept


def _stem(recipe: str, contents: Sequence[str]) -> str:
    return f"{recipe[:32]}-{hashlib.sha256(' '.join(contents).encode()).hexdigest()[:32]}"


def _load(folder: Path, recipe: str, contents: Sequence[str]) -> Images | None:
    stem = _stem(recipe, contents)
    try:
        listed = json.loads((folder / f"{stem}.json").read_bytes())
        images = np.load(folder / f"{stem}.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):  # absent or damaged: prepare again
        return None
    sound = images.dtype == np.float32 and images.ndim > 1 and len(images) == len(contents) > 0
    return images if sound and listed == list(contents) else None


def _rows_before(folder: Path, recipe: str) -> dict[str, Images]:
    rows: dict[str, Images] = {}
    for listing in sorted(folder.glob(f"{recipe[:32]}-*.json")):
        with suppress(OSError, ValueError):
            contents = json.loads(listing.read_bytes())
            images = _load(folder, recipe, contents)
            if images is not None:
                rows.update(zip(contents, images, strict=True))
    return rows


def _write(
    draft: Path, contents: Sequence[str], before: dict[str, Images], prepare: Callable[[str], Images | None]
) -> tuple[str, ...]:
    """Write rows one after the other, so that a full disk is an error and not a crash of a mapping."""
    kept: list[str] = []
    shape: tuple[int, ...] = ()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for content in contents:
            image = before.get(content)
            if image is None:
                image = prepare(content)
            if image is None:
                continue
            if not kept:
                shape = image.shape
                _write_header(file, (len(contents), *shape))
            if image.shape != shape or image.dtype != np.float32:
                raise ValueError(f"prepared image {image.dtype} {image.shape}, expected float32 {shape}")
            file.write(np.ascontiguousarray(image, dtype="<f4").data)
            kept.append(content)
        if not kept:
            raise CohortError(
                "no image can be decoded",
                remedy="See what is in quarantine and why: fedward-site cohort show",
            )
        file.seek(0)
        _write_header(file, (len(kept), *shape))
        file.flush()
        os.fsync(file.fileno())
    return tuple(kept)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the npy header; NumPy pads it so that its length does not depend on the number of rows."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _publish(draft: Path, folder: Path, recipe: str, contents: Sequence[str]) -> None:
    stem = _stem(recipe, contents)
    draft.replace(folder / f"{stem}.npy")
    write_atomically(folder / f"{stem}.json", json.dumps(list(contents)).encode())
    for old in folder.glob(f"{recipe[:32]}-*"):
        if old.stem != stem:
            old.unlink(missing_ok=True)
