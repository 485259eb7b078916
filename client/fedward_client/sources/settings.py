"""The `[source]` table of site.toml: where the images are, and how the site may reach them.

Three kinds: a folder, a DICOMweb service, a DICOM node (DIMSE). Secrets stand in files of their own, never
here and never on a command line. Images cross the network unencrypted only where the operator wrote
`unencrypted = true`. No library of DICOM is imported here: the daemon reads its settings with this.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, model_validator

from fedward_common.federation import Address, split_address

AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
"""PS3.5 6.2: up to 16 characters of ASCII without backslash; spaces around it say nothing."""

Uid = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$", max_length=64)]
CodeString = Annotated[str, Field(pattern=r"^[A-Z0-9_ ]{1,16}$")]
ListedText = Annotated[str, Field(pattern=r"^[^\\*?\x00-\x1f]{1,16}$")]
"""An SH value to be matched as it is: no wildcard, no second value."""

Host = Annotated[str, Field(pattern=r"^([A-Za-z0-9.-]{1,253}|[0-9a-f:]{2,45})$")]

_DEFAULT_ATTEMPTS = 5


def spool_root(home: Path) -> Path:
    """Where the spool of a site keeps its files; the folder need not exist yet."""
    return home / "spool" / "files"


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with https:// (or http://) and a host")
    if parts.username or parts.password:
        raise ValueError("must not hold credentials; use `user` with `password_file`, or `token_file`")
    if parts.query or parts.fragment or re.search(r"[\s\\]", url):
        raise ValueError("must end with the path of the service, as in https://pacs.example/dicom-web")
    return url.rstrip("/")


class Tls(BaseModel, frozen=True, extra="forbid"):
    """Whom to trust, and who this site is; `[source.tls]`.

    Attributes:
        ca_file: authorities to trust, PEM; absent: those of the machine.
        certificate: this site's certificate, PEM, for mutual TLS.
        key: its private key, PEM without passphrase, mode 0600.
    """

    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` belong together")
        return self

    def resolved(self, home: Path) -> Self:
        """The same with relative paths taken from the site's home."""
        return self.model_copy(
            update={
                name: None if path is None else home / path
                for name, path in (
                    ("ca_file", self.ca_file),
                    ("certificate", self.certificate),
                    ("key", self.key),
                )
            }
        )


class Selection(BaseModel, frozen=True, extra="forbid"):
    """Which studies to ask a PACS for; the cohort's own filters decide again on the real headers.

    Attributes:
        modalities: of the series; none: all.
        date_from, date_to: StudyDate, both inclusive.
        body_parts: BodyPartExamined of the series; a series without one is taken.
        accessions: AccessionNumber of the studies, a closed list.
        studies: StudyInstanceUID of the studies, a closed list.
    """

    modalities: tuple[CodeString, ...] = ()
    date_from: date | None = None
    date_to: date | None = None
    body_parts: tuple[CodeString, ...] = ()
    accessions: tuple[ListedText, ...] = Field(default=(), repr=False)
    studies: tuple[Uid, ...] = Field(default=(), repr=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.date_from and self.date_to and self.date_from > self.date_to:
            raise ValueError("`date_from` is later than `date_to`")
        return self

    @property
    def is_everything(self) -> bool:
        """Whether nothing limits it: the whole archive."""
        limits = (self.modalities, self.date_from, self.date_to, self.accessions, self.studies)
        return not any(limits)

    @property
    def digest(self) -> str:
        """Tells one selection from another without quoting it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def date_range(self) -> str:
        """StudyDate as a query matches it (PS3.4 C.2.2.2.5); empty: any date."""
        first = f"{self.date_from:%Y%m%d}" if self.date_from else ""
        last = f"{self.date_to:%Y%m%d}" if self.date_to else ""
        return f"{first}-{last}" if first or last else ""

    def study_keys(self) -> Iterator[dict[str, str]]:
        """Matching keys of queries for studies, by DICOM keyword: one query for each value of a list.

        Not every PACS understands several values in one, and one that does not finds nothing.
        """
        dates = {"StudyDate": self.date_range} if self.date_range else {}
        if self.studies or self.accessions:
            yield from ({**dates, "StudyInstanceUID": uid} for uid in self.studies)
            yield from ({**dates, "AccessionNumber": number} for number in self.accessions)
        elif self.modalities:
            yield from ({**dates, "ModalitiesInStudy": modality} for modality in self.modalities)
        else:
            yield dates

    def takes_series(self, modality: str, body_part: str) -> bool:
        """Whether a series with these values, as the PACS states them, belongs to it; "" is unknown."""
        return (not self.modalities or not modality or modality in self.modalities) and (
            not self.body_parts or not body_part or body_part.upper() in self.body_parts
        )


class FolderConfig(BaseModel, frozen=True, extra="forbid"):
    """Images lie in a folder.

    Attributes:
        path: any names, any depth; only ever read.
        poll_s: how often it is looked at while it is watched.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    poll_s: float = Field(default=60.0, ge=0.1, le=86_400)

    def images(self, home: Path) -> Path:
        """The folder in which the images lie."""
        return home / self.path

    def resolved(self, home: Path) -> Self:
        """The same with relative paths taken from the site's home."""
        return self.model_copy(update={"path": home / self.path})


class _Remote(BaseModel, frozen=True, extra="forbid"):
    """What every source over the network has.

    Attributes:
        unencrypted: images may cross the network in the clear.
        timeout_s: for one step of the network: connecting, or the next bytes.
        attempts: how often a step is tried before the run ends.
        first_wait_s: pause before the second attempt; it doubles with each.
        max_object_mb: larger instances are refused; the index would not read them either.
        spool_gb: what the spool may hold.
        poll_s: how often the PACS is asked while it is watched; or what it pushed is looked at, then every
            30 s unless it is given.
    """

    tls: Tls | None = None
    unencrypted: bool = False
    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    attempts: int = Field(default=_DEFAULT_ATTEMPTS, ge=1, le=20)
    first_wait_s: float = Field(default=1.0, ge=0, le=60)
    max_object_mb: int = Field(default=256, ge=1, le=256)
    spool_gb: float = Field(default=100.0, gt=0, le=1_000_000)
    poll_s: float = Field(default=600.0, ge=0.1, le=86_400)

    def images(self, home: Path) -> Path:
        """The folder in which the images lie once they are here."""
        return spool_root(home)

    @property
    def max_object_bytes(self) -> int:
        """Size limit of one instance."""
        return self.max_object_mb * 2**20

    @property
    def max_spool_bytes(self) -> int:
        """Size limit of the spool."""
        return int(self.spool_gb * 1e9)


class DicomwebConfig(_Remote, frozen=True, extra="forbid"):
    """Images are asked for over DICOMweb: QIDO-RS to search, WADO-RS to retrieve.

    Attributes:
        url: of the service, up to the part in front of "/studies".
        user, password_file: HTTP basic authentication; the file holds one line, mode 0600.
        token_file: bearer token, one line, mode 0600; read anew for each request, so it may be renewed.
    """

    kind: Literal["dicomweb"]
    url: Annotated[str, AfterValidator(_plain_url)]
    user: str | None = Field(default=None, min_length=1, max_length=256, pattern=r"^[^:\x00-\x1f]+$")
    password_file: Path | None = None
    token_file: Path | None = None

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if (self.user is None) != (self.password_file is None):
            raise ValueError("`user` and `password_file` belong together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("give either `user` with `password_file`, or `token_file`, not both")
        if not self.is_encrypted and self.tls is not None:
            raise ValueError("`tls` needs an https:// address")
        _check_encryption(self.is_encrypted, self.unencrypted, self.host)
        return self

    @property
    def is_encrypted(self) -> bool:
        """Whether the service is asked over TLS."""
        return urlsplit(self.url).scheme == "https"

    @property
    def host(self) -> str:
        """Host in the address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Port in the address, or the usual one."""
        return urlsplit(self.url).port or (443 if self.is_encrypted else 80)

    def resolved(self, home: Path) -> Self:
        """The same with relative paths taken from the site's home."""
        changes: dict[str, object] = {"tls": self.tls and self.tls.resolved(home)}
        changes["password_file"] = self.password_file and home / self.password_file
        changes["token_file"] = self.token_file and home / self.token_file
        return self.model_copy(update=changes)


class DimseConfig(_Remote, frozen=True, extra="forbid"):
    """Images come from a DICOM node: C-FIND with C-GET or C-MOVE, or pushed by it with C-STORE.

    Attributes:
        host, port, pacs_ae_title: where the PACS listens and how it is called.
        ae_title: what this site is called; the PACS must know it.
        retrieve: "get" over the association that asked, "move" to our listener, "push": only listen.
        listen: our own address and port, for "move" and "push".
        senders: AE titles that may push; none: the PACS alone.
        sender_hosts: network addresses that may push; none: any. An AE title is no proof of anything.
        max_association_gb: what one association may send before it is ended.
    """

    kind: Literal["dimse"]
    host: Host
    port: int = Field(ge=1, le=65535)
    pacs_ae_title: AeTitle
    ae_title: AeTitle
    retrieve: Literal["get", "move", "push"] = "get"
    listen: Address | None = None
    senders: tuple[AeTitle, ...] = ()
    sender_hosts: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...] = ()
    max_association_gb: float = Field(default=50.0, gt=0, le=10_000)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.retrieve != "get":
            if self.listen is None:
                raise ValueError(f'`listen` is needed with retrieve = "{self.retrieve}"')
            if self.tls is not None and self.tls.certificate is None:
                raise ValueError("listening with TLS needs `certificate` and `key` in [source.tls]")
            # What another machine can reach, another machine may be sent to in the clear.
            _check_encryption(self.tls is not None, self.unencrypted, split_address(self.listen)[0])
        _check_encryption(self.tls is not None, self.unencrypted, self.host)
        return self

    @property
    def allowed_senders(self) -> tuple[str, ...]:
        """AE titles that may push to us."""
        return self.senders or (self.pacs_ae_title,)

    @property
    def max_association_bytes(self) -> int:
        """Size limit of one association."""
        return int(self.max_association_gb * 1e9)

    def resolved(self, home: Path) -> Self:
        """The same with relative paths taken from the site's home."""
        return self.model_copy(update={"tls": self.tls and self.tls.resolved(home)})


SourceConfig = Annotated[FolderConfig | DicomwebConfig | DimseConfig, Field(discriminator="kind")]
"""The `[source]` table, by its `kind`."""

RemoteConfig = DicomwebConfig | DimseConfig


def _check_encryption(encrypted: bool, unencrypted: bool, host: str) -> None:
    if encrypted and unencrypted:
        raise ValueError("`unencrypted` contradicts TLS; remove it")
    if not encrypted and not unencrypted and not _is_this_machine(host):
        raise ValueError(
            "images and credentials would cross the network in the clear: use TLS"
            " (https://, or [source.tls]), or accept it with unencrypted = true"
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
