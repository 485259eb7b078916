"""A site's settings, and where a site keeps what.

HOME/site.toml        settings (this module)      HOME/policy.toml    what may run unasked (policy.py)
HOME/identity/        keys and certificates       HOME/plans/         plans and approvals (approvals.py)
HOME/pseudonym.key    key of the case ids         HOME/audit.jsonl    the audit log
HOME/index.sqlite     the cohort                  HOME/site.log       the daemon's log
HOME/spool/           images fetched from a PACS  HOME/site.lock      held by the daemon
HOME/cohort.toml      which images are used       HOME/excluded.json  cases taken out by name
HOME/surveys/         counts given to surveys, what plans were told, and findings for the operator
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedward_client.site_data import SiteData
from fedward_client.sources.settings import FolderConfig, SourceConfig
from fedward_common.errors import UsageError
from fedward_common.federation import Address
from fedward_common.plan import Name

Device = Literal["auto", "cpu", "cuda", "mps"]


class SiteConfig(BaseModel, frozen=True, extra="forbid"):
    """The settings in `site.toml`.

    Attributes:
        name: the site's name, as in its certificate.
        server: "host:port" of the federation's server.
        dicom: folder with DICOM files, only ever read; or else
        source: where the images come from: another kind of source, or a folder with settings of its own.
        labels: CSV file with the labels; not needed where cohort.toml takes them from DICOM objects.
        threads: CPU threads for training; 0 uses all cores.
        device: where to train; "auto" takes a GPU if there is one.
    """

    name: Name
    server: Address
    dicom: Path | None = None
    source: SourceConfig | None = None
    labels: Path | None = None
    threads: int = Field(default=0, ge=0, le=1024)
    device: Device = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dicom is None) == (self.source is None):
            raise ValueError("give either `dicom`, a folder, or a table [source]")
        return self

    @property
    def images(self) -> SourceConfig:
        """Where the images come from, however it was written."""
        if self.source is not None:
            return self.source
        assert self.dicom is not None
        return FolderConfig(path=self.dicom)

    def site_data(self, home: Path) -> SiteData:
        """Where the data side of the site finds its images, labels and state."""
        return SiteData(home, self.images.images(home), self.labels and home / self.labels)


@dataclass(frozen=True)
class SiteHome:
    """The folder that belongs to one site; everything the site itself writes is in it."""

    root: Path

    @property
    def config(self) -> Path:
        """Settings."""
        return self.root / "site.toml"

    @property
    def identity(self) -> Path:
        """Keys and certificates."""
        return self.root / "identity"

    @property
    def pseudonym_key(self) -> Path:
        """Key of the case ids."""
        return self.root / "pseudonym.key"

    @property
    def policy(self) -> Path:
        """What may run unasked, and what may never run; need not exist."""
        return self.root / "policy.toml"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.root / "audit.jsonl"

    @property
    def index(self) -> Path:
        """The cohort."""
        return self.root / "index.sqlite"

    @property
    def plans(self) -> Path:
        """Plans seen here, with their approvals."""
        return self.root / "plans"

    @property
    def lock(self) -> Path:
        """Held by the daemon that serves this home; the file itself says nothing."""
        return self.root / "site.lock"

    @property
    def log(self) -> Path:
        """What the daemon did and why something failed, for the operator."""
        return self.root / "site.log"


def load_config(home: SiteHome) -> SiteConfig:
    """Read a site's settings; relative paths are taken from the site's home.

    Raises:
        UsageError: not a site's home, not TOML, an unknown key, or a value out of bounds; all are named.
    """
    path = home.config
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        config = SiteConfig.model_validate(document)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}",
            remedy="Give a site's folder with --home, or make one: fedward-site join",
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", remedy="Correct the file.") from error
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error)}", remedy="Correct the named keys.") from error
    root = home.root.absolute()  # whoever reads these paths may take them from the home once more
    return config.model_copy(
        update={
            "dicom": config.dicom and root / config.dicom,
            "source": config.source and config.source.resolved(root),
            "labels": config.labels and root / config.labels,
        }
    )


def faults_of(error: ValidationError) -> str:
    """Every fault of a document with its key, on one line."""
    return "; ".join(
        f"{'.'.join(str(step) for step in fault['loc']) or 'file'}: {fault['msg']}"
        for fault in error.errors(include_url=False)
    )
