"""The facts of one header that fedward knows, as a record that travels between modules (hop 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date


@dataclass(frozen=True)
class Header:
    """Facts from one header. Identifiers and texts stay out of `repr`, so no log line can show them.

    Lengths are in mm, angles in degrees, b-values in s/mm2. What an enhanced multi-frame object says
    frame by frame is not here but in `functional_groups.read_frame_facts`.

    Attributes:
        study_year: year of StudyDate, or None.
        sex: "M", "F", "O", or None.
        age_years: completed years from PatientAge, or None.
        pixel_bytes_left: bytes of the pixel data's value that are there; None when unknown (deflated).
        trigger: TriggerTime, ms.
        position: ImagePositionPatient.
        orientation: ImageOrientationPatient, row direction then column direction.
        pixel_spacing: PixelSpacing, between rows then between columns; as imager_pixel_spacing.
        spacing_between: SpacingBetweenSlices.
        gantry_tilt: GantryDetectorTilt.
        has_overlay: a group 60xx is present.
        num_private: private elements outside sequences.
        regions: ultrasound regions are present.
        is_grid: the image is many slices side by side, and not a mosaic that says so.
        is_directory: it is a DICOMDIR.
    """

    sop_class: str = field(repr=False)
    transfer_syntax: str = field(repr=False)
    sop_instance: str = field(repr=False)
    series: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    modality: str = field(repr=False)
    study_year: int | None
    sex: str | None
    age_years: int | None
    num_frames: int
    samples: int
    photometric: str = field(repr=False)
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: int
    burned_in: bool
    pixel_bytes_left: int | None
    pixel_kind: str = "integer"
    planar: int = 0
    study_date: date | None = field(default=None, repr=False)
    study_time: str = field(default="", repr=False)
    acquisition_time: str = field(default="", repr=False)
    accession: str = field(default="", repr=False)
    body_part: str = field(default="", repr=False)
    view_position: str = field(default="", repr=False)
    laterality: str = field(default="", repr=False)
    series_description: str = field(default="", repr=False)
    study_description: str = field(default="", repr=False)
    image_type: tuple[str, ...] = field(default=(), repr=False)
    manufacturer: str = field(default="", repr=False)
    model_name: str = field(default="", repr=False)
    series_number: int | None = None
    instance_number: int | None = None
    acquisition_number: int | None = None
    images_in_acquisition: int | None = None
    temporal_position: int | None = None
    echo_numbers: int | None = None
    echo_time: float | None = None
    trigger: float | None = None
    b_value: float | None = None
    frame_of_reference: str = field(default="", repr=False)
    position: tuple[float, float, float] | None = field(default=None, repr=False)
    orientation: tuple[float, float, float, float, float, float] | None = field(default=None, repr=False)
    pixel_spacing: tuple[float, float] | None = None
    imager_pixel_spacing: tuple[float, float] | None = None
    slice_thickness: float | None = None
    spacing_between: float | None = None
    gantry_tilt: float | None = None
    conversion_type: str = field(default="", repr=False)
    presentation_intent: str = field(default="", repr=False)
    has_overlay: bool = False
    num_private: int = 0
    regions: bool = False
    is_directory: bool = False
    is_grid: bool = False

    @property
    def is_localizer(self) -> bool:
        """Whether ImageType says so."""
        return "LOCALIZER" in self.image_type

    @property
    def num_pixel_bytes(self) -> int:
        """Bytes of the uncompressed pixels; single bits are packed across frames."""
        num_bits = self.rows * self.columns * self.samples * self.num_frames * self.bits_allocated
        return (num_bits + 7) // 8

    @property
    def num_native_bytes(self) -> int:
        """Bytes of the pixels as an uncompressed file stores them."""
        if self.photometric == "YBR_FULL_422":  # half the colour of every second pixel is not stored
            return self.num_pixel_bytes // 3 * 2
        return self.num_pixel_bytes
