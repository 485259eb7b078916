"""Build what label tests need: image volumes, and segmentations and reports written by highdicom."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

from fedward_client.dicom.label_grid import Grid
from tests.builders import a_dataset, a_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
LIVER = Code("10200004", "SCT", "Liver")
SPLEEN = Code("78961009", "SCT", "Spleen")
TUMOUR = Code("108369006", "SCT", "Neoplasm")
ORGAN = Code("123037004", "SCT", "Anatomical structure")


def a_volume(
    slices: int = 4,
    rows: int = 12,
    columns: int = 10,
    *,
    name: str = "ct",
    origin: Sequence[float] = (-20.0, 15.0, 40.0),
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = (0.7, 0.9),
    between: float = 2.5,
) -> list[Dataset]:
    """CT slices of one series, in order along the normal of their planes."""
    along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(along_row, along_column)
    found = []
    for index in range(slices):
        position = np.array(origin) + index * between * normal
        found.append(
            a_dataset(
                np.full((rows, columns), index, dtype=np.int16),
                SOPClassUID=CTImageStorage,
                SOPInstanceUID=a_uid(f"{name} {index}"),
                SeriesInstanceUID=a_uid(f"{name} series"),
                FrameOfReferenceUID=a_uid(f"{name} frame of reference"),
                Modality="CT",
                PatientName="A^B",
                PatientBirthDate="",
                PatientSex="",
                StudyDate="20200102",
                StudyTime="101112",
                AccessionNumber="",
                StudyID="",
                ReferringPhysicianName="",
                SeriesNumber=1,
                InstanceNumber=index + 1,
                ImagePositionPatient=[round(float(value), 9) for value in position],
                ImageOrientationPatient=[round(float(value), 12) for value in orientation],
                PixelSpacing=list(spacing),
                SliceThickness=between,
                PositionReferenceIndicator="",
            )
        )
        found[-1].file_meta.MediaStorageSOPClassUID = CTImageStorage
        found[-1].file_meta.MediaStorageSOPInstanceUID = found[-1].SOPInstanceUID
    return found


def grid_of(slices: Sequence[Dataset]) -> Grid:
    """Grid of slices in order, by hand from PS3.3 C.7.6.2.1.1 and LPS to RAS."""
    first, last = slices[0], slices[-1]
    x, y = (np.array(first.ImageOrientationPatient[part], float) for part in (slice(3), slice(3, 6)))
    row_mm, column_mm = map(float, first.PixelSpacing)
    start = np.array(first.ImagePositionPatient, float)
    end = np.array(last.ImagePositionPatient, float)
    step = (end - start) / (len(slices) - 1) if len(slices) > 1 else np.cross(x, y)
    affine = np.eye(4)
    affine[:3] = np.stack([step, y * row_mm, x * column_mm, start], axis=1)
    affine[:2] *= -1
    return Grid(
        affine,
        (len(slices), int(first.Rows), int(first.Columns)),
        str(first.get("FrameOfReferenceUID", "")),
        frozenset(str(each.SOPInstanceUID) for each in slices),
    )


def a_segmentation(
    sources: Sequence[Dataset],
    values: NDArray[Any],
    *,
    kind: str = "BINARY",
    types: Sequence[Code] = (LIVER,),
    transfer_syntax: str = ExplicitVRLittleEndian,
    **options: Any,
) -> Dataset:
    """SEG object.

    Args:
        sources: images it is drawn on.
        values: `(slices, rows, columns)` or, for several segments, `(slices, rows, columns, segments)`.
        kind: BINARY, FRACTIONAL or LABELMAP.
        types: property type of each segment.
        transfer_syntax: of the object.
        options: for highdicom.
    """
    descriptions = [
        hd.seg.SegmentDescription(
            number, f"segment {number}", ORGAN, code, hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, code in enumerate(types, start=1)
    ]
    return hd.seg.Segmentation(
        sources,
        values,
        kind,
        descriptions,
        a_uid("seg series"),
        5,
        a_uid("seg"),
        1,
        "fedward tests",
        "builder",
        "1",
        "1",
        transfer_syntax_uid=transfer_syntax,
        **options,
    )


def a_report(
    sources: Sequence[Dataset],
    values: Sequence[tuple[Code, float, Code]] = (),
    *,
    about: Sequence[Dataset] | None = None,
    evaluations: Sequence[tuple[Code, Code]] = (),
    derivation: Code | None = None,
    finding: Code | None = None,
    group: Any = None,
    is_complete: bool = True,
    is_verified: bool = False,
) -> Dataset:
    """SR object after TID 1500 with one measurement group.

    Args:
        sources: images that were looked at.
        values: (concept, number, unit) of each measurement.
        about: images that the group is about; by default all of them.
        evaluations: (concept, code) pairs.
        derivation: of every number, such as mean.
        finding: of the group.
        group: another group in place of the one described.
        is_complete: CompletionFlag.
        is_verified: VerificationFlag.
    """
    plain = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(a_uid("tracking"), "one"),
        source_images=[
            hd.sr.SourceImageForMeasurementGroup(each.SOPClassUID, each.SOPInstanceUID)
            for each in (sources if about is None else about)
        ],
        finding_type=finding,
        measurements=[
            hd.sr.Measurement(name, value, unit, derivation=derivation) for name, value, unit in values
        ],
        qualitative_evaluations=[hd.sr.QualitativeEvaluation(*each) for each in evaluations],
    )
    observer = hd.sr.ObserverContext(
        hd.sr.CodedConcept("121006", "DCM", "Person"),
        hd.sr.PersonObserverIdentifyingAttributes("CNRYOBSERVER^A"),
    )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_person_context=observer),
        procedure_reported=Code("77477000", "SCT", "CT"),
        imaging_measurements=[plain if group is None else group],
    )
    return hd.sr.ComprehensiveSR(
        evidence=list(sources),
        content=content,
        series_instance_uid=a_uid("sr series"),
        series_number=7,
        sop_instance_uid=a_uid(f"sr {values}{evaluations}{[each.SOPInstanceUID for each in about or ()]}"),
        instance_number=1,
        manufacturer="fedward tests",
        is_complete=is_complete,
        is_verified=is_verified,
        verifying_observer_name="CNRYVERIFIER^B" if is_verified else None,
        verifying_organization="x" if is_verified else None,
    )


def a_structure_set(
    slices: Sequence[Dataset],
    contours: Sequence[tuple[int, NDArray[np.float64]]],
    *,
    name: str = "GTV",
    geometric_type: str = "CLOSED_PLANAR",
) -> Dataset:
    """RTSTRUCT with one structure.

    Args:
        slices: images it is drawn on, in order.
        contours: (slice, corners `(n, 2)` as row and column) of each; pixel centres are whole numbers.
        name: ROIName.
        geometric_type: of every contour.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = a_uid(f"rtstruct {name}")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality = "RTSTRUCT"
    dataset.PatientID, dataset.StudyInstanceUID = slices[0].PatientID, slices[0].StudyInstanceUID
    dataset.SeriesInstanceUID = a_uid("rtstruct series")
    roi = Dataset()
    roi.ROINumber, roi.ROIName = 1, name
    roi.ReferencedFrameOfReferenceUID = slices[0].FrameOfReferenceUID
    dataset.StructureSetROISequence = [roi]
    drawn = Dataset()
    drawn.ReferencedROINumber = 1
    drawn.ContourSequence = [_contour(slices[index], corners, geometric_type) for index, corners in contours]
    dataset.ROIContourSequence = [drawn]
    return dataset


def _contour(image: Dataset, corners: NDArray[np.float64], geometric_type: str) -> Dataset:
    """Corners in patient coordinates, by PS3.3 C.7.6.2.1.1, with the digits that a decimal string has."""
    row_mm, column_mm = map(float, image.PixelSpacing)
    along_row = np.array(image.ImageOrientationPatient[:3], float)
    along_column = np.array(image.ImageOrientationPatient[3:], float)
    points = (
        np.array(image.ImagePositionPatient, float)
        + corners[:, :1] * row_mm * along_column
        + corners[:, 1:] * column_mm * along_row
    )
    item = Dataset()
    item.ContourGeometricType = geometric_type
    item.NumberOfContourPoints = len(points)
    item.ContourData = [f"{value:.6f}" for value in points.ravel()]
    reference = Dataset()
    reference.ReferencedSOPClassUID = image.SOPClassUID
    reference.ReferencedSOPInstanceUID = image.SOPInstanceUID
    item.ContourImageSequence = [reference]
    return item


def written(dataset: Dataset) -> bytes:
    """Bytes of a complete DICOM file."""
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()
