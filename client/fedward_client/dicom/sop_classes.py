"""Kinds of objects that hold images of patients, and the Modality that each may carry.

The name of a SOP class comes from the DICOM dictionary; the Modality is whatever a device wrote. Where
the two contradict each other the file is refused. Objects that are no images (reports, plans,
presentation states) and images of no grid in space or time (whole-slide microscopy) are not listed.
"""

from __future__ import annotations

from pydicom import uid

RADIOGRAPHS: dict[str, str] = {
    uid.ComputedRadiographyImageStorage: "CR",
    uid.DigitalXRayImageStorageForPresentation: "DX",
}

# Archives are full of them; pydicom has no names for them.
RETIRED_ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.3")
_RETIRED_NUCLEAR_MEDICINE = "1.2.840.10008.5.1.4.1.1.5"

IMAGE_SOP_CLASSES: dict[str, frozenset[str]] = {
    sop_class: frozenset(modalities.split())
    for sop_class, modalities in {
        uid.ComputedRadiographyImageStorage: "CR",
        uid.DigitalXRayImageStorageForPresentation: "DX",
        uid.DigitalXRayImageStorageForProcessing: "DX",
        uid.DigitalMammographyXRayImageStorageForPresentation: "MG",
        uid.DigitalMammographyXRayImageStorageForProcessing: "MG",
        uid.DigitalIntraOralXRayImageStorageForPresentation: "IO",
        uid.DigitalIntraOralXRayImageStorageForProcessing: "IO",
        uid.BreastTomosynthesisImageStorage: "MG",
        uid.BreastProjectionXRayImageStorageForPresentation: "MG",
        uid.BreastProjectionXRayImageStorageForProcessing: "MG",
        uid.CTImageStorage: "CT",
        uid.EnhancedCTImageStorage: "CT",
        uid.LegacyConvertedEnhancedCTImageStorage: "CT",
        uid.MRImageStorage: "MR",
        uid.EnhancedMRImageStorage: "MR",
        uid.EnhancedMRColorImageStorage: "MR",
        uid.LegacyConvertedEnhancedMRImageStorage: "MR",
        uid.PositronEmissionTomographyImageStorage: "PT",
        uid.EnhancedPETImageStorage: "PT",
        uid.LegacyConvertedEnhancedPETImageStorage: "PT",
        uid.NuclearMedicineImageStorage: "NM",
        _RETIRED_NUCLEAR_MEDICINE: "NM",
        uid.UltrasoundImageStorage: "US IVUS",
        uid.UltrasoundMultiFrameImageStorage: "US IVUS",
        **dict.fromkeys(RETIRED_ULTRASOUND, "US IVUS"),
        uid.EnhancedUSVolumeStorage: "US IVUS",
        uid.XRayAngiographicImageStorage: "XA",
        uid.EnhancedXAImageStorage: "XA",
        uid.XRayRadiofluoroscopicImageStorage: "RF",
        uid.EnhancedXRFImageStorage: "RF",
        uid.XRay3DAngiographicImageStorage: "XA",
        uid.XRay3DCraniofacialImageStorage: "DX CT",
        uid.ParametricMapStorage: "OT MR CT PT NM US",
        uid.RTImageStorage: "RTIMAGE",
        uid.OphthalmicPhotography8BitImageStorage: "OP",
        uid.OphthalmicPhotography16BitImageStorage: "OP",
        uid.OphthalmicTomographyImageStorage: "OPT",
        uid.WideFieldOphthalmicPhotographyStereographicProjectionImageStorage: "OP",
        uid.WideFieldOphthalmicPhotography3DCoordinatesImageStorage: "OP",
        uid.VLEndoscopicImageStorage: "ES",
        uid.VLMicroscopicImageStorage: "GM",
        uid.VLPhotographicImageStorage: "XC DMS",
        uid.DermoscopicPhotographyImageStorage: "DMS",
    }.items()
}
"""SOP class -> Modality values that it may carry."""

ANY_MODALITY = frozenset(
    {
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    }
)
"""Secondary captures: images of any origin. Whether one may train is the gate's decision."""
