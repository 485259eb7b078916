"""Why a file is not used, as a closed list, and what the operator can do about it.

A reason is a code from this list, never a text from a parser: parser messages quote the header, and
the header names the patient. The only addition is a name out of the DICOM dictionary itself.
"""

from __future__ import annotations

from enum import StrEnum

from fedward_common.errors import CohortError


class Reason(StrEnum):
    """Why a file stands in quarantine."""

    UNREADABLE = "unreadable"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_DICOM = "not_dicom"
    DIRECTORY = "directory"
    MALFORMED = "malformed"
    BEHIND_PIXELS = "behind_pixels"
    TRANSFER_SYNTAX = "transfer_syntax"
    DEFLATED = "deflated"
    DECODER_MISSING = "decoder_missing"
    SOP_CLASS = "sop_class"
    MISLABELLED = "mislabelled"
    NO_UID = "no_uid"
    NO_PATIENT = "no_patient"
    SAME_UID = "same_uid"
    MULTI_FRAME = "multi_frame"
    COLOUR = "colour"
    PHOTOMETRIC = "photometric"
    PIXEL_FORMAT = "pixel_format"
    DIMENSIONS = "dimensions"
    BURNED_IN = "burned_in"
    BURNED_IN_UNKNOWN = "burned_in_unknown"
    RECOGNIZABLE = "recognizable"
    SCREEN_CAPTURE = "screen_capture"
    TEXT_CLASS = "text_class"
    TEXT_DOCUMENT = "text_document"
    SECONDARY_IMAGE = "secondary_image"
    REGIONS = "regions"
    MASKED = "masked"
    UNREADABLE_SIGNS = "unreadable_signs"
    OVERLAYS = "overlays"
    PRIVATE_ELEMENTS = "private_elements"
    FACE = "face"
    DERIVED_IMAGE = "derived_image"
    IDENTITY_KEPT = "identity_kept"
    NOT_EXPORTABLE = "not_exportable"
    IDENTIFIER_LEFT = "identifier_left"
    PIXELS_CHANGED = "pixels_changed"
    CHANGED = "changed"
    NO_PIXELS = "no_pixels"
    TRUNCATED = "truncated"
    CODESTREAM = "codestream"
    DISPLAY_VALUES = "display_values"
    NO_COMMON_WINDOW = "no_common_window"
    NOT_HOUNSFIELD = "not_hounsfield"
    FRAME_FACTS = "frame_facts"
    MOSAIC = "mosaic"
    OVER_LIMIT = "over_limit"
    DECODE_FAILED = "decode_failed"
    DUPLICATE = "duplicate"
    LOCALIZER = "localizer"
    NO_POSITION = "no_position"
    MIXED_ORIENTATION = "mixed_orientation"
    MIXED_GRID = "mixed_grid"
    MIXED_SERIES = "mixed_series"
    VOLUMES_UNCLEAR = "volumes_unclear"
    INCOMPLETE_VOLUME = "incomplete_volume"
    REPEATED_POSITION = "repeated_position"
    MISSING_SLICES = "missing_slices"
    UNEQUAL_SPACING = "unequal_spacing"
    MISALIGNED = "misaligned"
    GANTRY_TILT = "gantry_tilt"
    SINGLE_SLICE = "single_slice"
    STILL_ARRIVING = "still_arriving"
    SEGMENTATION_FRAMES = "segmentation_frames"
    SEGMENTS_OVERLAP = "segments_overlap"
    NO_SEGMENT = "no_segment"
    LABEL_GEOMETRY = "label_geometry"
    LABEL_GRID = "label_grid"
    LABEL_SOURCE = "label_source"
    FRAME_OF_REFERENCE = "frame_of_reference"
    REPORT_TEMPLATE = "report_template"
    REPORT_UNFINISHED = "report_unfinished"
    REPORT_UNITS = "report_units"
    CONTOURS = "contours"

    @property
    def meaning(self) -> str:
        """What was found, in one sentence."""
        return _TEXTS[self][0]

    @property
    def remedy(self) -> str:
        """What the operator can do."""
        return _TEXTS[self][1]


class UnusableImageError(CohortError):
    """One file cannot be used; the others go on.

    Args:
        reason: from the closed list.
        kind: name of a SOP class or transfer syntax from the DICOM dictionary, or "".
    """

    def __init__(self, reason: Reason, kind: str = "") -> None:
        super().__init__(f"{reason.meaning}{f' ({kind})' if kind else ''}", remedy=reason.remedy)
        self.reason = reason
        self.kind = kind


_RESEND = "Send the image from the PACS again; if it stays, export it as Explicit VR Little Endian."
_ACCEPT = (
    "Look at some of them; if they are sound, name their SOP class in the gate's policy ([[gate.accept]])."
)
_EXPORT = "Export it again as single frames in grey, a radiograph for presentation."

_TEXTS: dict[Reason, tuple[str, str]] = {
    Reason.UNREADABLE: (
        "the operating system does not let this user read the file",
        "Correct its permissions, or check the disk; then index again.",
    ),
    Reason.EMPTY: ("the file is empty", "Send the image from the PACS again, or delete the file."),
    Reason.TOO_LARGE: (
        "the file is larger than reading one file may take",
        "Export it compressed or as single frames; move what is no image out of the folder.",
    ),
    Reason.NOT_DICOM: (
        "not a DICOM file",
        "Move it out of the image folder; unpack an archive (zip, tar) first; or send the image again.",
    ),
    Reason.DIRECTORY: (
        "a DICOMDIR, which lists the files of a medium and is no image",
        "Nothing to do: the images it lists are read by themselves.",
    ),
    Reason.MALFORMED: ("the DICOM header cannot be read", _RESEND),
    Reason.BEHIND_PIXELS: (
        "behind the pixels is what must not be there: a second picture, an overlay, or bytes of no element",
        _RESEND,
    ),
    Reason.TRANSFER_SYNTAX: (
        "this transfer syntax is not on the list of permitted ones",
        "Convert it, for example: dcmdjpeg IN OUT, or gdcmconv --raw IN OUT.",
    ),
    Reason.DEFLATED: (
        "a deflated file of this size could fill the memory when it is inflated",
        "Convert it first: dcmconv +te IN OUT.",
    ),
    Reason.DECODER_MISSING: (
        "the decoder for this transfer syntax is not installed",
        "pip install python-gdcm (JPEG Lossless), then index again; or convert with dcmdjpeg IN OUT.",
    ),
    Reason.SOP_CLASS: (
        "not a kind of object that this cohort can use",
        "Nothing to do if it is no image to learn from; else export it as an image of the modality that the"
        " cohort declares, a radiograph for presentation.",
    ),
    Reason.MISLABELLED: (
        "Modality contradicts the SOP class",
        "Correct Modality at its source; send again.",
    ),
    Reason.NO_UID: ("a UID is missing or not valid", _RESEND),
    Reason.NO_PATIENT: (
        "PatientID is empty, so the image cannot be kept on one side of the split",
        "Give each patient a PatientID (a pseudonym will do) and export again.",
    ),
    Reason.SAME_UID: (
        "other files with different content have the same SOPInstanceUID",
        "Keep the right one; give edited copies a UID of their own.",
    ),
    Reason.MULTI_FRAME: (
        "more than one frame, or a mosaic of slices",
        'Export single frames in grey; for slices of CT or MR set unit = "volume" in HOME/cohort.toml.',
    ),
    Reason.COLOUR: ("not a grey image", _EXPORT),
    Reason.PHOTOMETRIC: (
        "grey or colour is coded in a way that is not supported",
        "Export it as MONOCHROME2 or RGB, 8 or 16 bits a sample.",
    ),
    Reason.PIXEL_FORMAT: (
        "pixels in a form that readers understand differently, such as HighBit not BitsStored - 1",
        _EXPORT,
    ),
    Reason.DIMENSIONS: ("rows, columns or bits out of bounds", "Check the header; export the image again."),
    Reason.BURNED_IN: (
        "BurnedInAnnotation is YES: text may be part of the pixels",
        "Export the image without annotation.",
    ),
    Reason.BURNED_IN_UNKNOWN: (
        "this kind of image often has text in its pixels, and BurnedInAnnotation does not say NO",
        _ACCEPT,
    ),
    Reason.RECOGNIZABLE: (
        "RecognizableVisualFeatures is YES: the picture may show who the patient is",
        "Deface or crop it before export; or, if it may be used, accept its SOP class in the gate's policy.",
    ),
    Reason.SCREEN_CAPTURE: ("the header speaks of a captured screen, a scan or digitised film", _ACCEPT),
    Reason.TEXT_CLASS: ("screen captures, photographs and the like often show names", _ACCEPT),
    Reason.TEXT_DOCUMENT: (
        "a document or other object whose content is text",
        "Nothing to do: it is no image. Reports that hold labels are declared as labels.",
    ),
    Reason.SECONDARY_IMAGE: (
        "ImageType is SECONDARY, and BurnedInAnnotation does not say that there is no text",
        _ACCEPT,
    ),
    Reason.REGIONS: (
        "ultrasound without usable regions: what is picture and what is text is unknown",
        "Export with SequenceOfUltrasoundRegions, or name the part to keep in the gate's policy.",
    ),
    Reason.MASKED: (
        "everything outside the regions that hold the picture is blackened before use",
        "Nothing to do; look at a sample on the contact sheet.",
    ),
    Reason.UNREADABLE_SIGNS: (
        "an element that tells whether there is text in the picture cannot be read",
        _RESEND,
    ),
    Reason.OVERLAYS: (
        "the site's policy refuses images with overlays",
        "Export without overlays, or relax `overlays` in the gate's policy.",
    ),
    Reason.PRIVATE_ELEMENTS: (
        "more private elements than the site's policy permits",
        "Export without private elements, or raise `max_private` in the gate's policy.",
    ),
    Reason.FACE: (
        "the site's policy refuses head images, which show a face when they are rendered",
        "Deface them before export, or relax `faces` in the gate's policy.",
    ),
    Reason.DERIVED_IMAGE: (
        "the site's policy refuses images derived from others",
        "Send the originals, or relax `derived` in the gate's policy.",
    ),
    Reason.IDENTITY_KEPT: (
        "the site's policy wants PatientIdentityRemoved to be YES",
        "De-identify first: fedward-site cohort deidentify OUT; or relax the gate's policy.",
    ),
    Reason.NOT_EXPORTABLE: (
        "no rule makes a safe copy of this object",
        "Leave it out of the export, or convert it to a plain image first.",
    ),
    Reason.IDENTIFIER_LEFT: (
        "the copy still held an identifier of the original, so it was not kept",
        "See which element and notation the report names; remove it at the source, or leave the file out.",
    ),
    Reason.PIXELS_CHANGED: (
        "the pixels of the copy were not those of the original, so it was not kept",
        _RESEND,
    ),
    Reason.CHANGED: (
        "the file changed or vanished since it was indexed",
        "Wait until transfers into the image folder are finished; then: fedward-site cohort index.",
    ),
    Reason.NO_PIXELS: ("no pixel data", _RESEND),
    Reason.TRUNCATED: ("fewer pixels than the header announces", _RESEND),
    Reason.CODESTREAM: ("the compressed image contradicts the header", _RESEND),
    Reason.DISPLAY_VALUES: (
        "rescale or window values cannot be used",
        "Correct RescaleSlope, WindowWidth or the look-up table at their source.",
    ),
    Reason.NO_COMMON_WINDOW: (
        "the plan shows a volume as its files say, and they give its slices no window in common",
        'Ask the coordinator for a plan whose transforms.window is "percentiles" or two values in units.',
    ),
    Reason.NOT_HOUNSFIELD: (
        "the plan's window is in HU, and this CT image is not",
        "Leave such series out by series_description in HOME/cohort.toml, or export them with their rescale.",
    ),
    Reason.FRAME_FACTS: (
        "the functional groups do not describe every frame",
        "Export it again from the scanner or PACS, or as single-frame images.",
    ),
    Reason.MOSAIC: (
        "slices side by side in one picture (a mosaic) that cannot be placed with certainty",
        "Export it as single slices or as enhanced multi-frame.",
    ),
    Reason.OVER_LIMIT: (
        "reading or decoding it takes more memory or time than permitted",
        "If the image is sound, raise the decoder's limits; if not, delete it.",
    ),
    Reason.DECODE_FAILED: ("the pixels cannot be decoded", _RESEND),
    Reason.DUPLICATE: ("the same image is there more than once; one is used", "Nothing to do."),
    Reason.LOCALIZER: (
        "a localizer, or a single image across the volume beside it: no slice of a volume",
        "Nothing to do: the volume is used without it.",
    ),
    Reason.NO_POSITION: (
        "position, orientation or pixel spacing is missing or not valid",
        "Export the original images: captures and some conversions lose where a slice lies.",
    ),
    Reason.MIXED_ORIENTATION: (
        "slices of one series point in different directions and do not form stacks",
        "Reformat it at the scanner or workstation as parallel slices, or exclude the series.",
    ),
    Reason.MIXED_GRID: (
        "parallel slices of one series differ in rows, columns or pixel spacing",
        "Send each reconstruction as a series of its own.",
    ),
    Reason.MIXED_SERIES: (
        "slices of one series differ in frame of reference, or in kind: some were acquired, some derived",
        "Send each acquisition as a series of its own.",
    ),
    Reason.VOLUMES_UNCLEAR: (
        "several images at the same positions, and nothing says for certain which belong together",
        "Send each time point, echo or b-value as a series of its own, or the whole series again.",
    ),
    Reason.INCOMPLETE_VOLUME: (
        "slices of this time point, echo or b-value are missing; the complete ones are used",
        "Send the series from the PACS again if it should be complete.",
    ),
    Reason.REPEATED_POSITION: (
        "two images at one position, with nothing to tell them apart but their pixels",
        "Delete the wrong one, or send the series from the PACS again.",
    ),
    Reason.MISSING_SLICES: (
        "slices of the volume are missing, or are refused themselves",
        "Send the series from the PACS again.",
    ),
    Reason.UNEQUAL_SPACING: (
        "the distance between slices changes too much to interpolate",
        "Send the thin-slice reconstruction, or the series from the PACS again.",
    ),
    Reason.MISALIGNED: (
        "slices are shifted against each other within their plane",
        "Send each stack as a series of its own.",
    ),
    Reason.GANTRY_TILT: (
        "the gantry's tilt contradicts the positions of the slices",
        "Reformat the series without tilt at the scanner or workstation.",
    ),
    Reason.SINGLE_SLICE: (
        "a single slice without SliceThickness is no volume",
        "Send the whole series.",
    ),
    Reason.STILL_ARRIVING: (
        "images of this series are still arriving: some came a moment ago, or fewer are here than announced",
        "Wait until the transfer is finished, then: fedward-site cohort index. If it stays, send the series"
        " again; [arrival] in HOME/cohort.toml sets what counts as arriving.",
    ),
    Reason.SEGMENTATION_FRAMES: (
        "frames and segments of the segmentation contradict one another",
        "Export the segmentation again from the program that drew it.",
    ),
    Reason.SEGMENTS_OVERLAP: (
        "segments overlap where each pixel may have one label",
        "Use a task with one mask a segment, or correct the segmentation.",
    ),
    Reason.NO_SEGMENT: (
        "a segment or structure that the cohort names is missing",
        "Complete it, or declare that a missing one means an empty mask.",
    ),
    Reason.LABEL_GEOMETRY: (
        "position, orientation or spacing of the label object is missing or impossible",
        "Export it again from the program that drew it.",
    ),
    Reason.LABEL_GRID: (
        "the label does not lie on the pixels of the image",
        "Export the label on the grid of the original series, not of a resampled copy.",
    ),
    Reason.LABEL_SOURCE: (
        "the label object does not refer to this image",
        "Put the label object of this image into the folder, or remove the wrong one.",
    ),
    Reason.FRAME_OF_REFERENCE: (
        "label and image have different frames of reference, or none in common",
        "Use a label drawn on this very series; a registered copy will not do.",
    ),
    Reason.REPORT_TEMPLATE: (
        "not a measurement report after template TID 1500",
        "Export measurements as TID 1500, or give them as a label file.",
    ),
    Reason.REPORT_UNFINISHED: (
        "a report that is not complete or not verified, where the cohort asks for that",
        "Let it be completed and signed, or remove it.",
    ),
    Reason.REPORT_UNITS: (
        "the measurement is given in several units, or in another one than the cohort declares",
        "Declare the unit in cohort.toml and keep the reports in it only, or choose another concept.",
    ),
    Reason.CONTOURS: (
        "contours that are not closed, not flat, or cross one another",
        "Export the structure as closed planar contours on the image slices, or as a segmentation.",
    ),
}
