"""`fedward-site doctor`: every check runs, and each failure says what to do.

Nothing is changed, and nothing is sent but one request without content: with TLS 1.3 a client only learns
from an answer whether its certificate was accepted. The answer's date also shows a wrong clock, of which
the server would otherwise only say that it does not let the site in.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path

from fedward_client.approvals import PlanGate
from fedward_client.config import SiteHome, load_config
from fedward_client.policy import load_policy
from fedward_common.audit import AuditLog, verify
from fedward_common.errors import CohortError, ConnectionLostError, FederationError, IdentityError, UsageError
from fedward_common.files import write_new
from fedward_common.identity import (
    CERTIFICATE_FILE,
    FEDERATION_FILE,
    PRIVATE_FILES,
    client_context,
    load_identity,
    read_federation,
    read_private,
    split_address,
    validity_of,
)

_TIMEOUT_S = 5.0
_RENEW_DAYS = 14
_FREE_BYTES = 2_000_000_000
_CLOCK_TOLERANCE = timedelta(minutes=2)  # the server refuses messages that are five minutes off
_SOFTWARE = ("torch", "monai", "pydicom", "flwr")


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `remedy` is empty when it passed."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(home: Path, *, now: datetime | None = None) -> list[Check]:
    """Run every check on a site's home; a failure, of whatever kind, stops none of the others."""
    site, moment = SiteHome(home), now or datetime.now(UTC)
    parts: dict[str, Callable[[], str]] = {
        "settings": lambda: _settings(site),
        "private keys": lambda: _private_keys(site),
        "identity": lambda: _identity(site, moment),
        "certificate": lambda: _certificate(site, moment),
        "clock": lambda: _clock(site, moment),
        "server reachable": lambda: _reachable(site),
        "server accepts this site": lambda: _accepted(site, moment),
        "labels": lambda: _labels(site),
        "home writable": lambda: _writable(site),
        "disk space": lambda: _disk_space(site),
        "training software": _software,
        "policy": lambda: _policy(site),
        "plans": lambda: _plans(site, moment),
        "audit log": lambda: f"{verify(site.audit)} entries, chain intact",
    }
    outcomes: list[Check] = []
    for name, part in parts.items():
        if name == "labels":
            outcomes += _source(site)
        outcomes.append(_outcome(name, part))
    return outcomes


def _outcome(name: str, part: Callable[[], str]) -> Check:
    try:
        return Check(name, True, part())
    except FederationError as error:
        return Check(name, False, error.message, error.remedy)
    except OSError as error:
        return Check(name, False, f"{error.strerror}", "Correct owner and mode of the file or folder named.")
    except Exception as error:  # a check that breaks is a failed check, not the end of the others
        return Check(name, False, f"could not be checked: {type(error).__name__}", "Report this as a fault.")


def _settings(site: SiteHome) -> str:
    config = load_config(site)
    return f"site {config.name}, server {config.server}, device {config.device}"


def _private_keys(site: SiteHome) -> str:
    paths = [*(site.identity / name for name in PRIVATE_FILES), site.pseudonym_key]
    faults: list[IdentityError] = []
    for path in paths:
        try:
            read_private(path)
        except IdentityError as error:
            faults.append(error)
    if faults:
        raise IdentityError(
            "; ".join(fault.message for fault in faults), remedy=" ".join(fault.remedy for fault in faults)
        )
    return f"{len(paths)} keys, readable by their owner alone"


def _identity(site: SiteHome, now: datetime) -> str:
    peer = load_identity(site.identity, now=now).peer
    name = load_config(site).name
    if peer.role != "site" or peer.name != name:
        raise IdentityError(
            f"certificate is for {peer.role} {peer.name}, {site.config.name} says site {name}",
            remedy="Join again with this site's own directory: fedward-site join",
        )
    return f"{peer.role} {peer.name} of federation {peer.federation_id}; key and certificate belong together"


def _certificate(site: SiteHome, now: datetime) -> str:
    _, last = validity_of(site.identity / CERTIFICATE_FILE)
    days = (last - now).days
    if days < _RENEW_DAYS:
        raise IdentityError(
            f"certificate expires in {days} days" if days >= 0 else f"certificate expired {-days} days ago",
            remedy="Ask the federation's operator for a new one.",
        )
    return f"valid for {days} more days"


def _clock(site: SiteHome, now: datetime) -> str:
    first, _ = validity_of(site.identity / CERTIFICATE_FILE)
    if now < first:
        raise IdentityError(
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, before the certificate was made"
            f" ({first:%Y-%m-%d %H:%M})",
            remedy="Set the clock, for example by switching on time synchronisation (NTP).",
        )
    return f"{now:%Y-%m-%d %H:%M} UTC, after the certificate was made"


def _reachable(site: SiteHome) -> str:
    address = load_config(site).server
    with _connect(address):
        return f"{address} answers"


def _accepted(site: SiteHome, now: datetime) -> str:
    address = load_config(site).server
    host, _ = split_address(address)
    context = client_context(load_identity(site.identity, now=now))
    request = f"GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        with _connect(address) as plain, context.wrap_socket(plain, server_hostname=host) as channel:
            channel.sendall(request.encode())
            answer, version = _read_head(channel), channel.version()
    except ssl.SSLCertVerificationError as error:
        raise ConnectionLostError(
            f"the server's certificate is not accepted: {error.verify_message}",
            remedy="Check `server` in site.toml and compare the federation's fingerprint by phone.",
        ) from error
    except (ssl.SSLError, ConnectionError) as error:
        raise _refused(getattr(error, "reason", None) or type(error).__name__) from error
    if not answer:
        raise _refused("connection closed")
    _compare_clocks(answer, now)
    return f"{version}, certificates accepted on both sides"


def _refused(why: str) -> ConnectionLostError:
    return ConnectionLostError(
        f"the server does not accept this site's certificate ({why})",
        remedy="Ask the federation's operator whether this site's certificate is current.",
    )


def _connect(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        return socket.create_connection((host, port), timeout=_TIMEOUT_S)
    except OSError as error:
        raise ConnectionLostError(
            f"{address} cannot be reached: {error.strerror or type(error).__name__}",
            remedy="Is the server running? Does the firewall let this machine out to that port?",
        ) from error


def _read_head(channel: ssl.SSLSocket) -> bytes:
    """Read the head of an HTTP answer, 8 KiB at most."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < 8192:
        block = channel.recv(4096)
        if not block:
            break
        head += block
    return head


def _compare_clocks(answer: bytes, now: datetime) -> None:
    """Compare the `Date` of an HTTP answer with this machine's clock; an answer without one says nothing."""
    lines = answer.decode("latin-1").split("\r\n")
    dates = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("date:")]
    if not dates:
        return
    try:
        difference = parsedate_to_datetime(dates[0]) - now
    except (ValueError, TypeError):
        return
    if abs(difference) > _CLOCK_TOLERANCE:
        raise ConnectionLostError(
            f"the server's clock and this one differ by {difference.total_seconds():.0f} s",
            remedy="Set this machine's clock, for example by switching on time synchronisation (NTP).",
        )


def _source(site: SiteHome) -> list[Check]:
    """Where the images come from, step by step up to the first that fails; imports what reaches a PACS."""
    from fedward_client.sources.checks import check_source

    try:
        steps = check_source(load_config(site).images, site.root)
    except FederationError as error:
        return [Check("DICOM folder", False, error.message, error.remedy)]
    return [Check(*step) for step in steps]


def _labels(site: SiteHome) -> str:
    from fedward_client.cohort_file import read_cohort_file

    data, source = load_config(site).site_data(site.root), read_cohort_file(site.root).labels.source
    if source != "csv":
        unused = "" if data.label_file is None else "; `labels` in site.toml is not used"
        return f"come from {source} among the images{unused}; see: fedward-site cohort index"
    path = data.labels
    try:
        with path.open(encoding="utf-8-sig") as file:
            num_columns = len(file.readline(65_536).split(","))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CohortError(
            f"{path}: {why}", remedy="Correct `labels` in site.toml; it is a CSV file in UTF-8."
        ) from error
    if num_columns < 2:
        raise CohortError(
            f"{path} has no columns", remedy="Give a CSV file with a head line of column names."
        )
    return f"can be read, {num_columns} columns"


def _writable(site: SiteHome) -> str:
    probe = site.root / ".doctor"
    probe.unlink(missing_ok=True)
    try:
        write_new(probe, b"doctor")
    except OSError as error:
        raise UsageError(
            f"{site.root}: {error.strerror}", remedy="Give the folder to the user that runs the site."
        ) from error
    probe.unlink()
    return "can be written"


def _disk_space(site: SiteHome) -> str:
    free = shutil.disk_usage(site.root).free
    if free < _FREE_BYTES:
        raise UsageError(
            f"{free / 1e9:.1f} GB free, {_FREE_BYTES / 1e9:.0f} GB needed", remedy="Free space for the cache."
        )
    return f"{free / 1e9:.0f} GB free"


def _software() -> str:
    missing = [name for name in _SOFTWARE if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"not installed: {', '.join(missing)}", remedy="Install fedward again: pip install fedward"
        )
    return f"{', '.join(_SOFTWARE)} are installed"


def _policy(site: SiteHome) -> str:
    policy = load_policy(site.policy)
    if not site.policy.exists():
        return "no policy.toml: every plan needs the operator's approval"
    return f"{len(policy.approve)} rules approve plans without asking"


def _plans(site: SiteHome, now: datetime) -> str:
    federation = read_federation(site.identity / FEDERATION_FILE)
    plans = PlanGate(site, federation, AuditLog(site.audit)).plans(now=now)
    waiting = [stored.signed for stored in plans if stored.status == "pending"]
    named = "".join(f"; read it: fedward-site plan approve {signed.digest[:12]}" for signed in waiting)
    return f"{len(plans)} known, {len(waiting)} wait for approval{named}"
