"""Try a source step by step, for `doctor`: each way to fail has a sentence and a remedy of its own.

The steps build on each other, so that the first that fails is the last that is tried. Nothing is retrieved,
and no outcome quotes a secret or an answer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fedward_client.sources.access import connect, server_context
from fedward_client.sources.folder import find_files
from fedward_client.sources.settings import (
    DicomwebConfig,
    DimseConfig,
    FolderConfig,
    RemoteConfig,
    SourceConfig,
)
from fedward_common.errors import CohortError, FederationError, UsageError
from fedward_common.federation import split_address

_VERIFICATION = "1.2.840.10008.1.1"


class SourceCheck(NamedTuple):
    """The outcome of one step; `remedy` is empty when it passed."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def check_source(config: SourceConfig, home: Path) -> list[SourceCheck]:
    """Try a source step by step, up to the first step that fails.

    Args:
        config: where the images are; relative paths in it are taken from the home.
        home: the site's.
    """
    done: list[SourceCheck] = []
    for name, step in _steps(config.resolved(home)):
        try:
            done.append(SourceCheck(name, True, step()))
        except FederationError as error:
            done.append(SourceCheck(name, False, error.message, error.remedy))
            break
        except Exception as error:  # a step that breaks is a failed step, not the end of `doctor`
            what = f"could not be checked: {type(error).__name__}"
            done.append(SourceCheck(name, False, what, "Report this as a fault."))
            break
    return done


def _steps(config: FolderConfig | RemoteConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    if isinstance(config, FolderConfig):
        yield "DICOM folder", lambda: _folder(config.path)
        return
    yield "PACS reachable", lambda: _reachable(config)
    if isinstance(config, DicomwebConfig):
        yield "PACS search", lambda: _web_search(config)
        return
    yield "PACS accepts this site", lambda: _echo(config)
    if config.retrieve != "get":
        yield "listening for the PACS", lambda: _listen(config)
    if config.retrieve != "push":
        yield "PACS search and retrieval", lambda: _query(config)


def _folder(folder: Path) -> str:
    remedy = "Correct `dicom` or [source] in site.toml, or give the site's user the right to read."
    if not os.access(folder, os.R_OK | os.X_OK) or not folder.is_dir():
        raise CohortError(f"{folder} is not a folder that can be read", remedy=remedy)
    found = next(find_files(folder), None)
    if found is None:
        raise CohortError(f"{folder} holds no file", remedy="Put DICOM files there; is it mounted?")
    if not os.access(os.fsencode(folder) + b"/" + found.name, os.R_OK):
        raise CohortError(f"{folder} holds files that cannot be read", remedy=remedy)
    return "can be read and is not empty; see: fedward-site cohort index"


def _reachable(config: RemoteConfig) -> str:
    connect(config.host, config.port, config.timeout_s).close()
    return f"{config.host}:{config.port} answers" + ("" if _is_encrypted(config) else ", not encrypted")


def _is_encrypted(config: RemoteConfig) -> bool:
    return config.is_encrypted if isinstance(config, DicomwebConfig) else config.tls is not None


def _web_search(config: DicomwebConfig) -> str:
    from fedward_client.sources.dicomweb import DicomwebArchive

    archive = DicomwebArchive(config)
    try:
        archive.ask_one()
    finally:
        archive.close()
    return "DICOMweb answers a search" + (
        " with this site's credentials" if config.user or config.token_file else ""
    )


def _echo(config: DimseConfig) -> str:
    from fedward_client.sources.association import associate, broken_off

    association = associate(config, [_VERIFICATION])
    try:
        if not association.accepted_contexts or association.send_c_echo().get("Status") != 0:
            raise broken_off()
    finally:
        association.release()
    return f"{config.pacs_ae_title} answers a C-ECHO from {config.ae_title}"


def _listen(config: DimseConfig) -> str:
    if config.tls is not None:
        server_context(config.tls)
    host, port = split_address(config.listen or "")
    try:
        with socket.create_server((host, port)):
            return f"{config.listen} is free{_exposure(config)}"
    except OSError as error:
        raise UsageError(
            f"cannot listen on {config.listen}: {error.strerror}",
            remedy="Give a free port of this machine as `listen`; a receiver that runs already is no fault.",
        ) from None


def _exposure(config: DimseConfig) -> str:
    """What to say when nothing but an AE title, which anybody can claim, keeps others from sending."""
    asks_for_certificate = config.tls is not None and config.tls.ca_file is not None
    if config.retrieve != "push" or config.sender_hosts or asks_for_certificate:
        return ""
    return "; any machine that claims a sender's AE title may push: `sender_hosts` limits that"


def _query(config: DimseConfig) -> str:
    from fedward_client.sources.dimse import DimseArchive

    archive = DimseArchive(config)
    try:
        archive.ask_one()
        archive.may_retrieve()
    finally:
        archive.close()
    return f"C-FIND and C-{config.retrieve.upper()} are permitted"
