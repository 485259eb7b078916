"""Write thousands of DICOM files that differ in a few fields: encode one, then replace bytes.

The template is encoded once by pydicom with values of full width; `fill` puts other values of at most
that width in their place. A thousand times cheaper than encoding each file, and as valid: every field
that changes is fixed in length and padded as PS3.5 6.2 asks.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

_UID_WIDTH = 44
_WIDEST_UID = "2.25." + "9" * (_UID_WIDTH - 5)

# Every file has these; a value put in later may be as wide as the one here, not wider.
_WIDEST_VALUES = {
    "SOPInstanceUID": _WIDEST_UID,
    "StudyInstanceUID": _WIDEST_UID,
    "SeriesInstanceUID": _WIDEST_UID,
    "PatientID": "9" * 16,
    "PatientName": "9" * 32,
    "StudyDate": "19991231",
    "PatientSex": "OO",
    "PatientAge": "999Y",
    "InstanceNumber": "99",
    "PhotometricInterpretation": "MONOCHROME2",
    "WindowCenter": "128.0000",
}


@dataclass(frozen=True)
class InventedPatient:
    """A patient who does not exist, with one study of one series."""

    study: str
    series: str
    patient_id: str
    sex: str
    age: str
    study_date: str

    def fields(self, instance: int) -> dict[str, str]:
        """Field values of the patient's image number `instance` (from 1)."""
        return {
            "SOPInstanceUID": _uid(f"{self.series}|{instance}"),
            "StudyInstanceUID": self.study,
            "SeriesInstanceUID": self.series,
            "PatientID": self.patient_id,
            "PatientName": f"SYNTHETIC^{self.patient_id}",
            "PatientSex": self.sex,
            "PatientAge": self.age,
            "StudyDate": self.study_date,
            "InstanceNumber": str(instance),
        }


def invented_patient(seed: int, site: str, number: int) -> InventedPatient:
    """Make up patient `number` of a site; the same arguments give the same patient."""
    name = f"fedward|{seed}|{site}|{number}"
    digest = hashlib.sha256(name.encode()).digest()
    return InventedPatient(
        study=_uid(f"{name}|study"),
        series=_uid(f"{name}|series"),
        patient_id=f"SYN{digest.hex()[:12].upper()}",
        sex="FM"[digest[20] % 2],
        age=f"{1 + digest[21] % 89:03d}Y",
        study_date=f"{2015 + digest[22] % 10}{1 + digest[23] % 12:02d}{1 + digest[24] % 28:02d}",
    )


class FileTemplate:
    """One encoded file, and where in it each changing field stands."""

    def __init__(self, dataset: Dataset) -> None:
        encoded = io.BytesIO()
        dcmwrite(encoded, dataset, enforce_file_format=True)
        self._bytes = encoded.getvalue()
        self._num_pixel_bytes = len(dataset.PixelData)
        self._places: dict[str, list[tuple[int, int]]] = {}
        for keyword in (*_WIDEST_VALUES, "PresentationLUTShape"):
            if keyword in dataset:
                self._places[keyword] = [_place(self._bytes, keyword)]
        self._places["SOPInstanceUID"].append(_place(self._bytes, "MediaStorageSOPInstanceUID"))

    def fill(self, fields: Mapping[str, str], pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
        """Return the file with these field values and pixels; fields not named keep the template's."""
        content = bytearray(self._bytes)
        for keyword, value in fields.items():
            pad = b"\0" if dictionary_VR(keyword) == "UI" else b" "
            for start, width in self._places[keyword]:
                encoded = value.encode("ascii").ljust(width, pad)
                if len(encoded) != width:
                    raise ValueError(f"{keyword} takes {width} characters")
                content[start : start + width] = encoded
        stored = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
        if len(stored) + len(stored) % 2 != self._num_pixel_bytes:
            raise ValueError(f"{len(stored)} bytes of pixels, {self._num_pixel_bytes} expected")
        content[-self._num_pixel_bytes :] = stored.ljust(self._num_pixel_bytes, b"\0")
        return bytes(content)


def cr_template(rows: int, columns: int) -> FileTemplate:
    """8-bit Computed Radiography image whose window shows stored values 0..255 as they are."""
    dataset = _image(ComputedRadiographyImageStorage, "CR", rows, columns, bits_stored=8)
    dataset.ViewPosition = "AP"
    dataset.WindowWidth = "256"
    return FileTemplate(dataset)


def dx_template(rows: int, columns: int, window_width: int) -> FileTemplate:
    """12-bit Digital X-Ray image for presentation, stored in 16 bits."""
    dataset = _image(DigitalXRayImageStorageForPresentation, "DX", rows, columns, bits_stored=12)
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = -1
    dataset.RescaleIntercept = "0"
    dataset.RescaleSlope = "1"
    dataset.RescaleType = "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.DetectorType = "DIRECT"
    dataset.ImagerPixelSpacing = ["0.2", "0.2"]
    dataset.ImageLaterality = "U"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ViewPosition = "PA"
    dataset.WindowWidth = str(window_width)
    return FileTemplate(dataset)


def _image(sop_class: str, modality: str, rows: int, columns: int, *, bits_stored: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(_WIDEST_UID)
    for keyword, value in _WIDEST_VALUES.items():
        setattr(dataset, keyword, value)
    dataset.SOPClassUID = sop_class
    dataset.Modality = modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    for keyword in ("StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientBirthDate", "StudyID"):
        setattr(dataset, keyword, "")
    dataset.Manufacturer = "fedward synthetic"
    dataset.SeriesNumber = "1"
    dataset.BodyPartExamined = "CHEST"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.SamplesPerPixel = 1
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = 8 if bits_stored == 8 else 16
    dataset.BitsStored, dataset.HighBit = bits_stored, bits_stored - 1
    dataset.PixelRepresentation = 0
    num_bytes = rows * columns * dataset.BitsAllocated // 8
    dataset.PixelData = bytes(num_bytes + num_bytes % 2)
    dataset["PixelData"].VR = "OB" if bits_stored == 8 else "OW"
    return dataset


def _place(encoded: bytes, keyword: str) -> tuple[int, int]:
    """Offset and length of an element's value, found by its tag and VR (PS3.5 7.1.2)."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"{keyword} is not a DICOM keyword")
    start = encoded.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF) + dictionary_VR(tag).encode())
    (length,) = struct.unpack_from("<H", encoded, start + 6)
    return start + 8, length


def _uid(name: str) -> str:
    """UUID-derived UID (PS3.5 B.2) of full width: the same name gives the same UID."""
    for attempt in range(1000):
        digest = hashlib.sha256(f"{name}|{attempt}".encode()).digest()
        uid = f"2.25.{UUID(bytes=digest[:16], version=5).int}"
        if len(uid) == _UID_WIDTH:
            return uid
    raise ValueError("no UID of full width found")
