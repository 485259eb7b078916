"""DICOM as hospitals send it: headers, pixels, and reasons to refuse a file. Parsers stay in here."""
