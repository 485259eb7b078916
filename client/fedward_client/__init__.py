"""The site daemon: DICOM cohort, local training, policy, and the one door out."""
