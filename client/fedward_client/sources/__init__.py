"""Where images come from: a folder, or a PACS over DICOMweb or DIMSE. They yield files, nothing more (hop 1).

`settings` says what site.toml may hold, `refresh` fetches, `checks` is for `doctor`. No library of DICOM or
HTTP is imported until a source that needs it is opened.
"""
