"""What a decoder process said about its files, rebuilt by type (hop 2); it is foreign input."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Union

from numpy.typing import NDArray
from pydicom._uid_dict import UID_dictionary

from fedward_client.dicom.frames import Frames
from fedward_client.dicom.header import UNKNOWN_KIND
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox_wire import Take, WireError, frames_from
from fedward_client.index_reading import found_from
from fedward_client.index_records import FileRead
from fedward_common.errors import CohortError

if TYPE_CHECKING:
    from fedward_client.dicom.deidentify import SafeCopy

What = Literal["frames", "image", "facts", "labels", "stored", "copy"]
_SHA256 = re.compile("[0-9a-f]{64}")

Outcome = Union[Frames, NDArray[Any], FileRead, str, CohortError, "SafeCopy"]


def outcomes_of(message: Any, num_files: int, what: What, take: Take) -> list[Outcome]:
    """Rebuild the answers to a request for so many files, or to the first of them.

    Args:
        message: as it came.
        num_files: asked about.
        what: was asked; see `DecodeSandbox.map`.
        take: gives an array out of shared memory.

    Raises:
        WireError, KeyError, TypeError, ValueError, IndexError, OverflowError: they make no sense.
    """
    replies = message["replies"]
    if not 1 <= len(replies) <= num_files:
        raise WireError
    return [_outcome(dict(reply), what, take) for reply in replies]


def _outcome(reply: dict[str, Any], what: What, take: Take) -> Outcome:
    if "refused" in reply:
        return UnusableImageError(Reason(reply["refused"]), _known_kind(reply["kind"]))
    if "changed" in reply:
        return not_to_be_had()
    if what == "facts":
        sha256, size, mtime_ns, found = reply["facts"]
        if not _SHA256.fullmatch(sha256) or not (type(size) is type(mtime_ns) is int):
            raise WireError
        if not (0 <= size < 2**63 and -(2**63) <= mtime_ns < 2**63):
            raise WireError
        return FileRead(sha256, size, mtime_ns, found_from(found, _known_kind))
    if what == "labels":
        return str(reply["labels"])
    if what == "copy":
        from fedward_client.dicom.copy_answers import copy_from  # few ask for copies

        return copy_from(reply, take)
    if what == "frames":
        return frames_from(reply["frames"], take)
    return take(*reply["image"])


def not_to_be_had() -> CohortError:
    """The file is gone, or no longer what it was."""
    return CohortError(
        "an image file changed or vanished while it was being prepared",
        remedy="Wait until the transfer into the image folder is finished, then start again.",
    )


def _known_kind(kind: Any) -> str:
    """A name out of the DICOM dictionary, nothing else: it is shown to people."""
    return kind if kind in _KINDS else ""


_KINDS = frozenset({entry[0] for entry in UID_dictionary.values()} | {UNKNOWN_KIND})
