"""Build what tests need: synthetic DICOM files, a site's folders, a plan. No real patient anywhere."""

from __future__ import annotations

import csv
import hashlib
import io
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config, dcmwrite
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

from fedward_client.site_data import SiteData
from fedward_common.plan import TrainingPlan, parse_plan

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int16]

_TEXT_VRS = ("PN", "LO", "SH", "LT", "ST", "UT", "UC")


def a_uid(name: str) -> str:
    """UID that depends on the name alone."""
    return f"2.25.{int.from_bytes(hashlib.sha256(name.encode()).digest()[:15], 'big')}"


def a_dataset(pixels: Pixels | None = None, **elements: Any) -> Dataset:
    """Radiograph with header; `elements` replaces values by keyword, None removes the element.

    Args:
        pixels: stored values, uint8, uint16 or int16 `(rows, columns)`; by default a ramp of 16 x 16.
        elements: for example PatientID="P1", Modality="DX".
    """
    if pixels is None:
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dx = elements.get("Modality") == "DX"
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation if dx else ComputedRadiographyImageStorage
    dataset.Modality = "CR"
    dataset.PatientID = "P1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = a_uid("study"), a_uid("series")
    bits = 8 * pixels.dtype.itemsize
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    stored = pixels.tobytes()
    dataset.PixelData = stored + b"\0" * (len(stored) % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    with config.disable_value_validation():  # values that the standard forbids are wanted here
        for keyword, value in elements.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
    if "SOPInstanceUID" not in elements:
        dataset.SOPInstanceUID = a_uid(f"{dataset.get('PatientID')}{elements}{stored[:64]!r}")
    return dataset


def encode(dataset: Dataset, transfer_syntax: str = ExplicitVRLittleEndian, preamble: bytes = b"") -> bytes:
    """Write a dataset as a DICOM file; elements that the standard requires may be absent."""
    file = io.BytesIO()
    with config.disable_value_validation():
        meta = dataset.file_meta
        meta.TransferSyntaxUID = UID(transfer_syntax)
        meta.MediaStorageSOPClassUID = UID(dataset.get("SOPClassUID", "1.2.3"))
        meta.MediaStorageSOPInstanceUID = UID(dataset.get("SOPInstanceUID", "1.2.3"))
        dataset.preamble = preamble.ljust(128, b"\0")
        dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def a_dicom(pixels: Pixels | None = None, **elements: Any) -> bytes:
    """DICOM file, Explicit VR Little Endian; see `a_dataset`."""
    return encode(a_dataset(pixels, **elements))


def a_site(
    folder: Path,
    *,
    num_patients: int = 8,
    images_per_patient: int = 2,
    split: Callable[[int], str] | None = None,
    columns: int = 16,
    **elements: Any,
) -> SiteData:
    """Write a site: images of different content, labels 0 and 1 by turns, no split unless asked for.

    Args:
        folder: gets home/, dicom/ and labels.csv.
        num_patients: patients P0, P1, ...
        images_per_patient: images of each.
        split: patient number -> side, for a split column.
        columns: columns of each image; 16 rows.
        elements: as for `a_dataset`, in every file.
    """
    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir(parents=True)
    site.dicom.mkdir()
    rows = []
    for patient in range(num_patients):
        for image in range(images_per_patient):
            uid = a_uid(f"{patient}-{image}")
            random = np.random.default_rng([patient, image])
            pixels = random.integers(0, 256, (16, columns), dtype=np.uint8)
            own = {"PatientID": f"P{patient}", "SOPInstanceUID": uid} | elements
            (site.dicom / f"{patient}-{image}.dcm").write_bytes(a_dicom(pixels, **own))
            rows.append([uid, patient % 2, *([split(patient)] if split else [])])
    write_labels(site.labels, rows, ["SOPInstanceUID", "label", *(["split"] if split else [])])
    return site


def write_labels(
    path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("SOPInstanceUID", "label")
) -> Path:
    """Write a label file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def canary_elements(mark: str = "CNRY") -> dict[str, str]:
    """Give every single-valued text element of the DICOM dictionary a string found nowhere else.

    The string is `mark` and the element's tag, so a leak says where it came from. Elements that only frame
    grabbers and film scanners write are left out: the gate would refuse the image.
    """
    capture = range(0x00181010, 0x0018101A)
    return {
        keyword_for_tag(tag): f"{mark}{tag:08X}"
        for tag, (vr, multiplicity, _, retired, _) in DicomDictionary.items()
        if vr in _TEXT_VRS and multiplicity.startswith("1") and not retired and 0x0008 <= tag >> 16 < 0x5000
        if tag not in capture
    }


def a_plan(**changes: Any) -> TrainingPlan:
    """Small plan; `changes` replaces whole tables or single values of it."""
    document: dict[str, Any] = {
        "name": "test",
        "rounds": 1,
        "participation": {"quorum": 1},
        "task": {"labels": ("normal", "pneumonia")},
        "transforms": {"size": (16, 16)},
        "model": {"name": "cnn2d"},
        "training": {"learning_rate": 0.01},
    }
    return parse_plan(document | changes)


@contextmanager
def a_disk_of(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond this while in the context: writes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
