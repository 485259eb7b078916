"""Run a DICOM parser on hostile input so that nothing it says gets out.

Parser warnings, log lines and exception texts quote header values, and those name patients. In here
warnings go nowhere, the parsers' loggers are shut, and every exception becomes one code.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom import config, dcmread
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_DEFLATED_BYTES = 64 * 2**10
"""pydicom inflates a deflated file whole, even for its header; deflate expands by at most 1032."""

for _name in ("pydicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls", "PIL"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


@contextmanager
def contained(reason: Reason) -> Iterator[None]:
    """Silence the parser and turn whatever it raises into `UnusableImageError(reason)`.

    The original exception is dropped on purpose (`from None`): its text would reach a traceback.
    """
    mode = config.settings.reading_validation_mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.settings.reading_validation_mode = config.IGNORE
        try:
            yield
        except UnusableImageError:
            raise
        except Exception:  # hostile input: parsers raise anything, RecursionError included
            raise UnusableImageError(reason) from None
        finally:
            config.settings.reading_validation_mode = mode


def parse(data: bytes, keywords: tuple[str, ...], *, pixels: bool) -> tuple[FileDataset, int]:
    """Read the named elements of a DICOM file held in memory; call it inside `contained`.

    Args:
        data: the whole file.
        keywords: elements to keep; no other value is held.
        pixels: read on past the header; else stop in front of the pixel data.

    Returns:
        The dataset, and the number of bytes that were not read (the pixel data and what follows).

    Raises:
        UnusableImageError: empty, not DICOM, or a deflated file that may be a bomb.
    """
    if not data:
        raise UnusableImageError(Reason.EMPTY)
    # Looked for anywhere: trusting the header's own structure here is what a bomb would exploit.
    if len(data) > MAX_DEFLATED_BYTES and DeflatedExplicitVRLittleEndian.encode() in data:
        raise UnusableImageError(Reason.DEFLATED)
    stream = io.BytesIO(data)
    try:
        dataset = dcmread(stream, stop_before_pixels=not pixels, specific_tags=list(keywords))
    except InvalidDicomError:
        raise UnusableImageError(Reason.NOT_DICOM) from None
    return dataset, len(data) - stream.tell()
