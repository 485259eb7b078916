"""Join a federation: turn the directory that the federation's operator handed over into a site's home.

The kit may arrive on a stick that knows no file modes, so its files are first copied as private ones and
then checked together. `site.toml` is written last: a home that has it is complete.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedward_client.config import Device, SiteConfig, SiteHome, faults_of, load_config
from fedward_client.pseudonyms import load_pseudonym_key
from fedward_common.audit import AuditLog
from fedward_common.errors import IdentityError, UsageError
from fedward_common.files import write_atomically, write_new
from fedward_common.identity import IDENTITY_FILES, Identity, load_identity


def join(
    kit: Path,
    home: Path,
    dicom: Path | None,
    labels: Path | None = None,
    threads: int = 0,
    device: Device = "auto",
    source: Path | None = None,
) -> SiteConfig:
    """Make a site's home, or leave nothing behind.

    Args:
        kit: the site's identity directory, made by `fedward provision`.
        home: new or empty folder for the site.
        dicom: folder with DICOM files; or else
        source: TOML file whose table [source] says where the images are; its other keys are not read.
        labels: CSV file with the labels; None where they will come from DICOM objects.
        threads: CPU threads for training; 0 uses all cores.
        device: where to train.

    Raises:
        UsageError: the home is in use, or a path or setting cannot be.
        IdentityError: the kit is incomplete, not a site's, or its parts do not belong together.
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise UsageError(
            f"{home} exists and is not an empty folder",
            remedy="Give another folder with --home; a site that has joined needs no second time.",
        )
    images = _images_of(dicom, source)
    if labels is not None and not labels.is_file():
        raise UsageError(f"{labels} is not a file", remedy="Give the CSV file with the labels: --labels")
    is_new = not home.exists()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _fill(SiteHome(home), kit, images, labels and labels.absolute(), threads, device)
    except BaseException as error:
        _clear(home, is_new)
        if isinstance(error, OSError):
            raise UsageError(
                f"{home}: {error.strerror}", remedy="Give a folder on a disk with space that this user owns."
            ) from error
        raise


def _clear(home: Path, is_new: bool) -> None:
    """Take back what an attempt left, so that the next one finds the home as this one found it."""
    for entry in home.glob("*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if is_new and home.exists():
        home.rmdir()


def _fill(
    home: SiteHome, kit: Path, images: dict[str, Any], labels: Path | None, threads: int, device: Device
) -> SiteConfig:
    home.root.chmod(0o700)
    identity = _copy_identity(kit, home.identity)
    try:
        config = SiteConfig.model_validate(
            {
                "name": identity.peer.name,
                "server": identity.federation.server,
                **images,
                "labels": labels,
                "threads": threads,
                "device": device,
            }
        )
    except ValidationError as error:
        raise UsageError(f"settings: {faults_of(error)}", remedy="Correct the named settings.") from error
    load_pseudonym_key(home.root)
    home.plans.mkdir(mode=0o700)
    AuditLog(home.audit).append(
        "joined", federation=identity.peer.federation_id, site=config.name, key=identity.signing_public_key
    )
    write_atomically(home.config, _as_toml(config).encode())
    return load_config(home)


def _copy_identity(kit: Path, directory: Path) -> Identity:
    """Copy the known files of a kit, private from their first moment, and check them together."""
    directory.mkdir(mode=0o700)
    for name in IDENTITY_FILES:
        try:
            write_new(directory / name, (kit / name).read_bytes())
        except OSError as error:
            raise IdentityError(
                f"{kit / name}: {error.strerror}",
                remedy="Give the whole directory that `fedward provision` made for this site.",
            ) from error
    identity = load_identity(directory)
    if identity.peer.role != "site":
        raise IdentityError(
            f"{kit} is the identity of a {identity.peer.role}, not of a site",
            remedy="Give the directory under sites/ that `fedward provision` made for this site.",
        )
    return identity


def _images_of(dicom: Path | None, source: Path | None) -> dict[str, Any]:
    """Where the images are, as a key of `site.toml` and its value; what they say is checked later."""
    if (dicom is None) == (source is None):
        raise UsageError(
            "where the images are is to be said in one way",
            remedy="Give a folder with DICOM files, --dicom, or the settings of a PACS, --source.",
        )
    if dicom is not None:
        if not dicom.is_dir():
            raise UsageError(f"{dicom} is not a folder", remedy="Give the folder with DICOM files: --dicom")
        return {"dicom": dicom.absolute()}
    assert source is not None
    remedy = "Give a TOML file with a table [source], as in deploy/site/dicomweb.toml: --source"
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8")).get("source")
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}", remedy=remedy) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{source} is not TOML: {error}", remedy=remedy) from error
    if table is None:
        raise UsageError(f"{source} has no table [source]", remedy=remedy)
    return {"source": table}


def _as_toml(config: SiteConfig) -> str:
    """Settings as TOML, read back before they are used: JSON's strings and numbers are TOML's too."""
    document = config.model_dump(mode="json", exclude_none=True, exclude={"source"})
    if config.source is not None:
        document["source"] = config.source.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    text = "\n".join(_lines_of(document)) + "\n"
    try:
        is_same = tomllib.loads(text) == document
    except tomllib.TOMLDecodeError:
        is_same = False
    if not is_same:
        raise UsageError("a path holds characters that TOML does not", remedy="Rename the folder or file.")
    return text


def _lines_of(table: dict[str, Any], name: str = "") -> Iterator[str]:
    yield from (f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict))
    for key, value in table.items():
        if isinstance(value, dict):
            yield from ("", f"[{name}{key}]", *_lines_of(value, f"{name}{key}."))
