"""The gate: may this picture train, must a part of it be blackened, or does it stay out (hop 2)?

A network sees pixels and a label, nothing else: no header value, name or private element reaches it,
so what could still identify a patient is text or a face in the picture. DICOM has no sure sign of text,
only signs that make it likely; the gate weighs them and, where they contradict or cannot be read, says
no. The rules follow PS3.15 E.1.1 and E.3.1 (Clean Pixel Data).

Guaranteed: an image whose header shows one of the signs below does not train, and outside the regions
of an ultrasound image every pixel is black. Not guaranteed: that an image without signs has no text, or
that a region holds no text; a head shows a face when rendered. So the operator looks at the contact
sheet, and `ocr.find_text` helps looking.

The settings of `GatePolicy` tighten this, except for one: `accept` lets images of one SOP class through
with findings that its operator names, and takes responsibility for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydicom import uid
from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]

from fedward_client.dicom.gate_facts import Box, GateFacts, gate_facts, read_gate_facts
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sop_classes import (
    ANY_MODALITY,
    IMAGE_SOP_CLASSES,
    RADIOGRAPHS,
    RETIRED_ULTRASOUND,
)

__all__ = [
    "Acceptance",
    "Box",
    "GateFacts",
    "GatePolicy",
    "GateVerdict",
    "gate_facts",
    "judge",
    "mask",
    "read_gate_facts",
]

ULTRASOUND = frozenset(
    {
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.EnhancedUSVolumeStorage,
        *RETIRED_ULTRASOUND,
    }
)
TEXT_CLASSES = ANY_MODALITY | {
    uid.VLEndoscopicImageStorage,
    uid.VLMicroscopicImageStorage,
    uid.VLPhotographicImageStorage,
    uid.DermoscopicPhotographyImageStorage,
}
"""Screen captures and photographs: out, whatever they say about themselves, unless accepted by name."""

MUST_SAY_NO = frozenset(
    {
        uid.XRayAngiographicImageStorage,
        uid.EnhancedXAImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.EnhancedXRFImageStorage,
        uid.RTImageStorage,
        uid.OphthalmicPhotography8BitImageStorage,
        uid.OphthalmicPhotography16BitImageStorage,
        uid.OphthalmicTomographyImageStorage,
        uid.WideFieldOphthalmicPhotographyStereographicProjectionImageStorage,
        uid.WideFieldOphthalmicPhotography3DCoordinatesImageStorage,
    }
)
"""Kinds whose devices often write on the picture: BurnedInAnnotation has to be NO."""

_WITH_PLACE = frozenset({uid.CTImageStorage, uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage})
_GREY_ONLY = (
    _WITH_PLACE
    | frozenset(RADIOGRAPHS)
    | {
        uid.EnhancedCTImageStorage,
        uid.EnhancedMRImageStorage,
        uid.EnhancedPETImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage,
        uid.LegacyConvertedEnhancedPETImageStorage,
        uid.DigitalMammographyXRayImageStorageForPresentation,
        uid.DigitalMammographyXRayImageStorageForProcessing,
        uid.BreastTomosynthesisImageStorage,
    }
)
"""Kinds that the standard wants in grey, and those it wants placed in the patient (PS3.3 C.7.6.2 and the
modules of each image): one that is not is most often a screen or a report under a scanner's name.
"""

_DOCUMENT_WORDS = (
    *("SR Storage", "Report", "Encapsulated", "Document", "Waveform", "Presentation State", "Protocol"),
    *("Procedure Log", "Record", "Plan", "Prescription", "Measurements", "Text"),
)
_KEPT_SHARE = 0.98  # regions that cover more than this leave nothing worth calling a mask

Decision = Literal["train", "mask", "quarantine"]
Liftable = Literal[
    "burned_in",
    "burned_in_unknown",
    "recognizable",
    "screen_capture",
    "text_class",
    "secondary_image",
    "regions",
]
_Count = Annotated[int, Field(ge=0, le=65535)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Acceptance(_Part):
    """The operator has looked at images of one SOP class and takes responsibility for a finding.

    Args:
        sop_class: DICOM keyword, for example "SecondaryCaptureImageStorage".
        findings: reasons that no longer keep it out. "burned_in" only together with `keep`.
        keep: parts (top, left, bottom, right) that stay; all else is blackened.
        rows: with `keep`: the acceptance is for images of exactly this height,
        columns: and this width; where text stands depends on the layout of the screen.
    """

    sop_class: str
    findings: Annotated[frozenset[Liftable], Field(min_length=1)]
    keep: tuple[tuple[_Count, _Count, _Count, _Count], ...] = ()
    rows: _Count | None = None
    columns: _Count | None = None

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The parts that stay."""
        return tuple(Box(*corners) for corners in self.keep)

    @model_validator(mode="after")
    def _complete(self) -> Acceptance:
        if self.sop_class not in {_name_and_keyword(known)[1] for known in _image_classes()}:
            raise ValueError("sop_class is not the DICOM keyword of a class of images")
        if "burned_in" in self.findings and not self.keep:
            raise ValueError("burned_in needs `keep`: text that is known to be there is never trained on")
        if self.keep and (self.rows is None or self.columns is None):
            raise ValueError("keep needs the rows and columns of the images that it fits")
        for box in self.boxes:
            if not (box.top < box.bottom <= (self.rows or 0) and box.left < box.right <= (self.columns or 0)):
                raise ValueError("keep: a part is empty or reaches out of the image")
        return self

    def covers(self, facts: GateFacts) -> bool:
        """Whether it speaks about this image."""
        fits = not self.keep or (facts.rows, facts.columns) == (self.rows, self.columns)
        return fits and _name_and_keyword(facts.sop_class)[1] == self.sop_class


class GatePolicy(_Part):
    """The site's own rules; every one but `accept` makes the gate stricter than it is by default.

    Args:
        burned_in_no: Modality values whose BurnedInAnnotation must be NO, besides the built-in ones.
        ultrasound: "quarantine" to keep it out even when its regions are known.
        overlays: "quarantine" for images with any overlay.
        derived: "quarantine" for images derived from others.
        faces: "quarantine" for CT, MR and PET images of the head.
        max_private: private elements permitted; None for any number.
        identity_removed: PatientIdentityRemoved must be YES.
        accept: findings that no longer keep an image out, by SOP class, on the operator's responsibility.
    """

    burned_in_no: frozenset[Annotated[str, Field(pattern="^[A-Z0-9]{2,16}$")]] = frozenset()
    ultrasound: Literal["mask", "quarantine"] = "mask"
    overlays: Literal["ignore", "quarantine"] = "ignore"
    derived: Literal["train", "quarantine"] = "train"
    faces: Literal["train", "quarantine"] = "train"
    max_private: _Count | None = None
    identity_removed: bool = False
    accept: tuple[Acceptance, ...] = ()


@dataclass(frozen=True)
class GateVerdict:
    """What becomes of one image.

    Args:
        decision: "train" as it is, "mask" everything outside `regions` first, or "quarantine".
        reason: why it is masked or kept out; None when it trains as it is.
        kind: name of the SOP class from the DICOM dictionary, where it is the reason; or "".
        regions: what stays when masked.
        clear_unused_bits: bits above BitsStored must be cleared before anyone looks at stored values.
    """

    decision: Decision
    reason: Reason | None = None
    kind: str = ""
    regions: tuple[Box, ...] = ()
    clear_unused_bits: bool = False

    @property
    def remedy(self) -> str:
        """What the operator can do; "" when there is nothing to be done."""
        return self.reason.remedy if self.reason else ""

    def refusal(self) -> UnusableImageError | None:
        """The error that stands in quarantine, or None."""
        if self.decision != "quarantine" or self.reason is None:
            return None
        return UnusableImageError(self.reason, self.kind)


class _Case(NamedTuple):
    facts: GateFacts
    policy: GatePolicy
    masked: bool  # by the image's own regions: text around the picture goes away


def judge(facts: GateFacts, policy: GatePolicy) -> GateVerdict:
    """Decide about one image from its header's facts; pure, and "quarantine" wherever in doubt."""
    accepted = [each for each in policy.accept if each.covers(facts)]
    lifted = frozenset(finding for each in accepted for finding in each.findings)
    kept = tuple(box for each in accepted for box in each.boxes)
    found = _ultrasound_regions(facts)
    case = _Case(facts, policy, bool(found))
    regions = kept or found
    for reason, applies in _RULES:
        if applies(case) and reason.value not in lifted:
            named = reason in (Reason.SOP_CLASS, Reason.TEXT_DOCUMENT, Reason.TEXT_CLASS)
            return GateVerdict("quarantine", reason, _kind(facts.sop_class) if named else "")
    bits = facts.overlay_in_pixels
    if regions:
        return GateVerdict("mask", Reason.MASKED, "", regions, bits)
    return GateVerdict("train", clear_unused_bits=bits)


def mask(
    values: NDArray[Any], regions: tuple[Box, ...], *, inverted: bool = False, colour: bool | None = None
) -> NDArray[Any]:
    """Blacken everything outside the regions.

    Args:
        values: `(rows, columns)`, `(frames, rows, columns)` or, in colour, with a last axis of 3.
        regions: what stays, in every frame.
        inverted: high values are dark (MONOCHROME1).
        colour: whether the last axis is colour; by default when there are four axes.

    Returns:
        A copy. Black is 0 in colour; in grey the lowest (inverted: highest) value that stays, so that
        what is masked does not stretch the range of values.

    Raises:
        UnusableImageError: no region, or one that reaches out of the image.
    """
    is_colour = values.ndim == 4 if colour is None else colour
    rows, columns = values.shape[-3:-1] if is_colour else values.shape[-2:]
    stays = np.zeros((rows, columns), dtype=bool)
    for box in regions:
        if not (0 <= box.top < box.bottom <= rows and 0 <= box.left < box.right <= columns):
            raise UnusableImageError(Reason.REGIONS)
        stays[box.top : box.bottom, box.left : box.right] = True
    if not stays.any():
        raise UnusableImageError(Reason.REGIONS)
    masked = values.copy()
    if is_colour:
        masked[..., ~stays, :] = 0
    else:
        kept = values[..., stays]
        masked[..., ~stays] = kept.max() if inverted else kept.min()
    return masked


def _ultrasound_regions(facts: GateFacts) -> tuple[Box, ...]:
    """Regions of an ultrasound image that leave something to be masked."""
    if facts.sop_class not in ULTRASOUND or facts.regions_unusable or not facts.regions:
        return ()
    stays = np.zeros((facts.rows, facts.columns), dtype=bool)
    for box in facts.regions:
        stays[box.top : box.bottom, box.left : box.right] = True
    return facts.regions if stays.mean() <= _KEPT_SHARE else ()


def _name_and_keyword(sop_class: str) -> tuple[str, str]:
    """From the dictionary itself: `uid.UID` would put a hostile value in a warning."""
    entry = UID_dictionary.get(sop_class)
    return (entry[0], entry[4]) if entry else ("", "")


def _image_classes() -> frozenset[str]:
    return frozenset(IMAGE_SOP_CLASSES) | ANY_MODALITY


def _kind(sop_class: str) -> str:
    return _name_and_keyword(sop_class)[0] or "not in the DICOM dictionary"


def _is_document(facts: GateFacts) -> bool:
    if facts.sop_class in _image_classes():
        return False
    name, _ = _name_and_keyword(facts.sop_class)
    return any(word in name for word in _DOCUMENT_WORDS)


def _must_say_no(case: _Case) -> bool:
    facts, policy = case.facts, case.policy
    posing = (facts.colour and facts.sop_class in _GREY_ONLY) or (
        facts.placeless and facts.sop_class in _WITH_PLACE
    )
    other_modality = facts.modality not in IMAGE_SOP_CLASSES.get(facts.sop_class, {facts.modality})
    return facts.sop_class in MUST_SAY_NO or facts.modality in policy.burned_in_no or other_modality or posing


def _no_regions(case: _Case) -> bool:
    """Regions over all of the image prove nothing by themselves; NO together with them does."""
    facts = case.facts
    if facts.sop_class not in ULTRASOUND or case.masked:
        return False
    return facts.regions_unusable or not facts.regions or facts.burned_in != "no"


_TOMOGRAPHIC = frozenset({"CT", "MR", "PT"})
_Rule = Callable[[_Case], bool]

# The first that applies is the reason. What can never be lifted comes first.
_RULES: tuple[tuple[Reason, _Rule], ...] = (
    (Reason.UNREADABLE_SIGNS, lambda case: bool(case.facts.malformed)),
    (Reason.TEXT_DOCUMENT, lambda case: _is_document(case.facts)),
    (Reason.SOP_CLASS, lambda case: case.facts.sop_class not in _image_classes()),
    (Reason.BURNED_IN, lambda case: case.facts.burned_in == "yes" and not case.masked),
    (Reason.RECOGNIZABLE, lambda case: case.facts.recognizable == "yes"),
    (Reason.TEXT_CLASS, lambda case: case.facts.sop_class in TEXT_CLASSES),
    (
        Reason.SCREEN_CAPTURE,
        lambda case: (
            case.facts.says_capture
            or (
                case.facts.sop_class not in TEXT_CLASSES
                and (case.facts.capture_device or bool(case.facts.conversion_type))
            )
            or case.facts.conversion_type in ("DF", "SD")  # digitised film and scanned documents carry labels
        ),
    ),
    (
        Reason.BURNED_IN_UNKNOWN,
        lambda case: case.facts.burned_in != "no" and not case.masked and _must_say_no(case),
    ),
    (
        Reason.SECONDARY_IMAGE,
        lambda case: (
            "SECONDARY" in case.facts.image_type[1:2] and case.facts.burned_in != "no" and not case.masked
        ),
    ),
    (Reason.REGIONS, lambda case: _no_regions(case)),
    (
        Reason.REGIONS,
        lambda case: case.facts.sop_class in ULTRASOUND and case.policy.ultrasound == "quarantine",
    ),
    (
        Reason.OVERLAYS,
        lambda case: case.facts.overlay_planes > 0 and case.policy.overlays == "quarantine",
    ),
    (
        Reason.PRIVATE_ELEMENTS,
        lambda case: case.policy.max_private is not None and case.facts.num_private > case.policy.max_private,
    ),
    (
        Reason.FACE,
        lambda case: case.policy.faces == "quarantine" and _shows_face(case.facts),
    ),
    (
        Reason.DERIVED_IMAGE,
        lambda case: case.policy.derived == "quarantine" and "DERIVED" in case.facts.image_type,
    ),
    (
        Reason.IDENTITY_KEPT,
        lambda case: case.policy.identity_removed and case.facts.identity_removed != "yes",
    ),
)


def _shows_face(facts: GateFacts) -> bool:
    return facts.head and bool(IMAGE_SOP_CLASSES.get(facts.sop_class, frozenset()) & _TOMOGRAPHIC)
