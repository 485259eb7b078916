"""Make the copy of one file that may leave the hospital, and prove it safe; `safe_export.py` writes it.

A file is judged by the gate, copied by an allow-list around PS3.15 (`deidentify_rules.py`), encoded
in memory, and then doubted: its pixels are compared with the original's, and its bytes are searched for
every identifier of the original (`byte_scan.py`). Only a copy that passes both is ever handed out. What fails
is told by element and notation, never by a value.

What is written: a zero preamble, File Meta Information made anew, PatientIdentityRemoved and the codes
of what was done, pseudonyms, UIDs and dates under the site's key. All files of a patient keep their
references and intervals. Names of files come from the new UIDs; mode 0600 in folders of mode 0700.

Limits: a head can be recognised from its scan, a name inside an ultrasound region stays, and text that
somebody typed in place of a code or a machine's name is found only if it repeats an identifier.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.filewriter import dcmwrite
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from fedward_client.dicom.byte_scan import MAX_INFLATED_BYTES, Leak, scan, scan_text
from fedward_client.dicom.copy_pixels import Decoder, PixelChange, prove_pixels, put_pixels
from fedward_client.dicom.deidentify_rules import CHARACTERISTICS, Action, action_of
from fedward_client.dicom.gate import GatePolicy, GateVerdict, gate_facts, judge
from fedward_client.dicom.identifiers import collect
from fedward_client.dicom.kept_numbers import empty_telling_numbers
from fedward_client.dicom.needles import NeedleSet, needles_of
from fedward_client.dicom.nested import num_items_in
from fedward_client.dicom.parser import ParsedFile, contained, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.replacements import Replacements
from fedward_client.dicom.safe_copy import Retained, clean, declare, own_texts

IMPLEMENTATION_UID = "2.25.186294012366290912450437214912736471037"
IMPLEMENTATION_NAME = "FEDWARD"

REPORTS = frozenset(
    {
        uid.BasicTextSRStorage,
        uid.EnhancedSRStorage,
        uid.ComprehensiveSRStorage,
        uid.Comprehensive3DSRStorage,
        uid.KeyObjectSelectionDocumentStorage,
    }
)
WITHOUT_PICTURE = REPORTS | {
    uid.SegmentationStorage,
    uid.ParametricMapStorage,
    uid.RealWorldValueMappingStorage,
    uid.RTDoseStorage,
    uid.RTStructureSetStorage,
    uid.RTPlanStorage,
}
"""Objects that go with images: their pixels, if any, are computed, so the gate's rules do not apply."""

_REPEATING_VRS = frozenset(("LO", "SH", "CS", "LT", "UC", "IS", "DS"))
_MAX_ITEMS = 150_000
"""Of one file: an enhanced image has six to twelve for each frame, and a compressed frame is one."""

_PIXEL_GROUPS = (0x0028, 0x7FE0)
_NEVER_EMPTIED = frozenset(
    (
        *("Modality", "ImageType", "PatientIdentityRemoved", "LongitudinalTemporalInformationModified"),
        *("CodeValue", "CodingSchemeDesignator", "ValueType", "RelationshipType", "ContinuityOfContent"),
        *("SegmentationType", "SegmentNumber", "InstanceNumber", "GraphicType"),
    )
)
"""Without these the copy could not be read any more; one that repeats an identifier is not handed out."""


class ExportOptions(BaseModel):
    """What the operator chose.

    Args:
        keep_times: times of day stay; else they are emptied and dates lose them.
        keep_characteristics: sex, age (at most 90 years), size and weight stay.
        safe_private: private elements known to be safe, "GGGG|creator|EE"; numbers only.
        gate: which images may be exported, and what is blackened.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_times: bool = False
    keep_characteristics: bool = False
    safe_private: frozenset[
        Annotated[str, Field(pattern=r"^[0-9A-F]{3}[13579BDF]\|[^|]{1,64}\|[0-9A-F]{2}$")]
    ] = frozenset()
    gate: GatePolicy = GatePolicy()

    @property
    def retained(self) -> Retained:
        """What stays in the header."""
        return Retained(self.keep_times, self.keep_characteristics, self.safe_private)


@dataclass(frozen=True)
class SafeCopy:
    """One copy that passed its proof, not yet written.

    Args:
        name: where it belongs, relative, made of pseudonyms.
        data: the file.
        pixels: what was done to its pixels.
        num_searched: identifiers of the source that its bytes were searched for.
        num_not_searched: identifiers too short, too common or too plain to be searched for.
    """

    name: str
    data: bytes
    pixels: PixelChange
    num_searched: int
    num_not_searched: int


class IdentifierLeftError(UnusableImageError):
    """The copy still held identifiers; `leaks` says which elements and how, without values."""

    def __init__(self, leaks: tuple[Leak, ...]) -> None:
        super().__init__(Reason.IDENTIFIER_LEFT)
        self.leaks = leaks


def make_copy(data: bytes, key: bytes, options: ExportOptions, decode: Decoder | None = None) -> SafeCopy:
    """Make and prove the safe copy of one file held in memory; nothing is written.

    Args:
        data: the file.
        key: the site's secret of 32 bytes; the same key gives the same pseudonyms.
        options: what stays.
        decode: decodes compressed pixels that have to be changed; None decodes in this process.

    Raises:
        IdentifierLeftError: the copy still holds an identifier.
        UnusableImageError: the gate keeps it in, no rule covers it, it is damaged, or the pixels of the
            copy are not those of the original.
    """
    with contained(Reason.MALFORMED):
        parsed = parse_file(data)
        _check_items(data)
        facts = gate_facts(parsed.elements)
        verdict = _verdict(facts.sop_class, judge(facts, options.gate))
        dataset, preamble = _read(data, parsed)
        exempt = CHARACTERISTICS if options.keep_characteristics else frozenset()
        creators = [name.split("|")[1] for name in options.safe_private]
        source = collect(dataset, preamble=preamble, meta=dataset.file_meta, exempt=exempt, creators=creators)
        replacements = Replacements(key, _patient(dataset))
        copy = clean(dataset, replacements, options.retained)
        if not copy.get("SOPInstanceUID"):
            raise UnusableImageError(Reason.NO_UID)
        empty_telling_numbers(copy, source.identifiers, replacements.written)
        put = put_pixels(copy, parsed, data, verdict, decode)
        declare(copy, options.retained, masked=put.change == "masked", report=facts.sop_class in REPORTS)
        needles = needles_of(source, (*replacements.written, replacements.patient))
        written = _encode(copy, put.syntax)
        leaks = scan(written, needles, own_texts())
        if leaks and _empty_repetitions(copy, needles):
            written = _encode(copy, put.syntax)
            leaks = scan(written, needles, own_texts())
        if leaks:
            raise IdentifierLeftError(leaks)
        prove_pixels(written, dataset, data, put, verdict)
    name = _name(copy, replacements)
    return SafeCopy(name, written, put.change, needles.num_searched, needles.num_not_searched)


def _empty_repetitions(copy: Dataset, needles: NeedleSet) -> int:
    """Empty what may stay but repeats an identifier: a name typed as a machine's, a number as a series'.

    Only elements that were taken over as they are and describe no pixels; an identifier that is left
    where a rule should have removed it is a fault of the rules, and that copy is not handed out.

    Returns:
        how many.
    """
    num_emptied = 0
    for element in copy.iterall():
        tag, vr = int(element.tag), str(element.VR)
        if vr not in _REPEATING_VRS or tag >> 16 in _PIXEL_GROUPS or element.keyword in _NEVER_EMPTIED:
            continue
        if action_of(tag, vr) is Action.KEEP and scan_text(str(element.value), needles):
            element.value = ""
            num_emptied += 1
    return num_emptied


def _verdict(sop_class: str, verdict: GateVerdict) -> GateVerdict:
    if sop_class in WITHOUT_PICTURE and verdict.reason is not Reason.UNREADABLE_SIGNS:
        return GateVerdict("train")
    if verdict.reason in (Reason.SOP_CLASS, Reason.TEXT_DOCUMENT):
        raise UnusableImageError(Reason.NOT_EXPORTABLE, verdict.kind)
    refusal = verdict.refusal()
    if refusal is not None:
        raise refusal
    return verdict


def _read(data: bytes, parsed: ParsedFile) -> tuple[Dataset, bytes]:
    """All elements, and the 128 bytes in front of them."""
    stream = io.BytesIO(data)
    preamble = read_preamble(stream, force=True) or b""
    if parsed.syntax != DeflatedExplicitVRLittleEndian:
        # Looked for anywhere: pydicom would inflate without a limit.
        if DeflatedExplicitVRLittleEndian.encode() in data:
            raise UnusableImageError(Reason.DEFLATED)
        return dcmread(io.BytesIO(data), force=True), preamble
    whole = parse_file(data, max_inflated=MAX_INFLATED_BYTES)
    if len(whole.body) >= MAX_INFLATED_BYTES:
        raise UnusableImageError(Reason.DEFLATED)
    _check_items(whole.body)
    meta = read_dataset(stream, False, True, stop_when=_is_behind_meta)
    dataset = read_dataset(io.BytesIO(whole.body), False, True)
    dataset.file_meta = FileMetaDataset(meta)
    return dataset, preamble


def _check_items(data: bytes) -> None:
    """A copy is made of pydicom's objects, at more than a kilobyte an item, and written item by item.

    Raises:
        UnusableImageError: more items than any image has.
    """
    if num_items_in(data) > _MAX_ITEMS:
        raise UnusableImageError(Reason.OVER_LIMIT)


def _is_behind_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != 2


def _patient(dataset: Dataset) -> str:
    """What tells this patient from others, with the element's name so that a name is never an ID."""
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID"):
        value = str(dataset.get(keyword) or "").strip(" \0")
        if value:
            return f"{keyword}|{value}"
    raise UnusableImageError(Reason.NO_PATIENT)


def _encode(copy: Dataset, syntax: str) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = copy.SOPClassUID
    meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    copy.file_meta = meta
    copy.preamble = bytes(128)
    encoded = io.BytesIO()
    dcmwrite(encoded, copy, enforce_file_format=True)
    return encoded.getvalue()


def _name(copy: Dataset, replacements: Replacements) -> str:
    study, series = (
        replacements.name(kind, str(copy.get(keyword, "")))
        for kind, keyword in (("study", "StudyInstanceUID"), ("series", "SeriesInstanceUID"))
    )
    return (
        f"{replacements.patient}/{study}/{series}/{replacements.name('file', str(copy.SOPInstanceUID))}.dcm"
    )
