"""Where one site keeps its images, its labels and its own state.

The only thing that the data side of a site needs to know: no keys, no network, no plan. The daemon
hands it to the worker process, and the operator's commands build it from `site.toml`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedward_common.errors import CohortError

COHORT_FILE = "cohort.toml"
EXCLUSION_FILE = "excluded.json"


@dataclass(frozen=True)
class SiteData:
    """The three places of a site.

    Args:
        home: the site's own folder (index, pseudonym key, cache); readable by its owner alone.
        dicom: folder with DICOM files, any names, any depth; only ever read.
        label_file: CSV file, see `labels.py` for its columns; None where labels come from DICOM objects.
        min_patients: least number of patients behind a number that leaves; 1 where none does.
    """

    home: Path
    dicom: Path
    label_file: Path | None
    min_patients: int = 1

    @property
    def labels(self) -> Path:
        """The label file.

        Raises:
            CohortError: the site names none.
        """
        if self.label_file is None:
            raise CohortError(
                "labels come from a CSV file, and site.toml names none",
                remedy="Give `labels` in HOME/site.toml; or, if DICOM objects hold them, declare those under"
                " [labels] in HOME/cohort.toml.",
            )
        return self.label_file

    def declaration(self) -> str:
        """Digest of what the operator says may be used: what is open since before a change is out of date."""
        digest = hashlib.sha256()
        for name in (COHORT_FILE, EXCLUSION_FILE):
            try:
                said = (self.home / name).read_bytes()
            except FileNotFoundError:
                said = b""
            digest.update(hashlib.sha256(said).digest())
        return digest.hexdigest()
