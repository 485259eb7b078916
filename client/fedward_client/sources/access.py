"""How a site gets in to its PACS: secret files, TLS, and what to say when a connection does not come about.

Every fault has a sentence and a remedy of its own, and none quotes a secret, a query or an answer.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
from contextlib import suppress
from pathlib import Path

from fedward_client.sources.settings import Tls
from fedward_common.errors import ConnectionLostError, IdentityError

_MAX_SECRET = 16_384


class PacsAwayError(ConnectionLostError):
    """The PACS cannot be reached or broke off; the same step may well succeed a little later.

    Args:
        retry_after_s: how long the PACS itself asked us to wait; None when it did not say.
        unreachable: not even a connection came about.
    """

    def __init__(
        self, message: str, *, remedy: str, retry_after_s: float | None = None, unreachable: bool = False
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s, self.unreachable = retry_after_s, unreachable


def read_secret(path: Path) -> str:
    """Read a password or token: one line, in a file that only its owner can read.

    Raises:
        IdentityError: missing, open to others, empty, or not one line of text.
    """
    text = _read_private(path)
    try:
        secret = text.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        secret = ""
    if not secret or any(ord(letter) < 32 for letter in secret):
        raise IdentityError(
            f"{path} does not hold one line of text",
            remedy="Write the password or token into it, nothing else.",
        )
    return secret


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_SECRET + 1)
    except OSError as error:
        raise IdentityError(
            f"{path}: {error.strerror}", remedy="Put the secret there, with mode 0600, or correct [source]."
        ) from None
    if mode & 0o077:
        raise IdentityError(
            f"{path} is open to other users (mode {mode:04o}, expected 0600)",
            remedy=f"chmod 600 {path}; if others could have read it, have the PACS issue another.",
        )
    if len(data) > _MAX_SECRET:
        raise IdentityError(f"{path} is too long for a secret", remedy="Correct [source] in site.toml.")
    return data


def client_context(tls: Tls | None) -> ssl.SSLContext:
    """TLS towards a PACS: its certificate and host name are checked, ours is shown if there is one.

    Raises:
        IdentityError: a file named in the settings cannot be used.
    """
    tls = tls or Tls()
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _trust(context, tls.ca_file)
    _show(context, tls)
    return context


def server_context(tls: Tls) -> ssl.SSLContext:
    """TLS for our listener; with a `ca_file`, who connects must show a certificate from it.

    Raises:
        IdentityError: a file named in the settings cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, tls)
    if tls.ca_file is not None:
        _trust(context, tls.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _trust(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(
            f"{path}: {error.strerror if not isinstance(error, ssl.SSLError) else 'not a certificate'}",
            remedy="Correct `ca_file` in [source.tls]: the authority of the PACS, PEM.",
        ) from None


def _show(context: ssl.SSLContext, tls: Tls) -> None:
    if tls.certificate is None or tls.key is None:
        return
    _read_private(tls.key)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        what = "not a certificate with its key" if isinstance(error, ssl.SSLError) else error.strerror
        raise IdentityError(
            f"{tls.certificate}: {what}",
            remedy="Correct `certificate` and `key` in [source.tls]: PEM, the key without passphrase.",
        ) from None


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """Open a connection to a PACS.

    Raises:
        PacsAwayError: no such name, no route, nothing listens, or no answer; each with its remedy.
    """
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise unreachable(host, port, error) from None


def unreachable(host: str, port: int, error: OSError) -> PacsAwayError:
    """The sentence and the remedy for a connection that did not come about."""
    place = f"{host}:{port}"
    if isinstance(error, socket.gaierror):
        return PacsAwayError(
            f"no address is known for the PACS {host}",
            remedy="Correct the host name in [source] of site.toml, or the name server of this machine.",
            unreachable=True,
        )
    if isinstance(error, ConnectionRefusedError):
        return PacsAwayError(
            f"nothing listens on {place}",
            remedy="Is the PACS running? Correct host and port in [source] of site.toml.",
            unreachable=True,
        )
    if isinstance(error, TimeoutError):
        return PacsAwayError(
            f"{place} does not answer",
            remedy="Ask for this machine to be let through the firewall between it and the PACS.",
            unreachable=True,
        )
    return PacsAwayError(
        f"there is no way to {place}: {error.strerror or type(error).__name__}",
        remedy="Check this machine's network, and host and port in [source] of site.toml.",
        unreachable=True,
    )


def handshake(context: ssl.SSLContext, host: str, port: int, timeout_s: float) -> str:
    """Connect with TLS and hang up; returns the protocol version.

    With TLS 1.3 the PACS judges our certificate only after its own handshake: a short wait for its alert,
    which a satisfied PACS never sends, tells the two apart.

    Raises:
        ConnectionLostError: unreachable, not TLS, or one side does not accept the other's certificate.
    """
    with connect(host, port, timeout_s) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as channel:
                version = channel.version() or ""
                channel.settimeout(min(timeout_s, 0.5))
                with suppress(TimeoutError):
                    channel.recv(1)
                return version
        except OSError as error:
            raise tls_fault(error) from None


def tls_fault(error: OSError) -> ConnectionLostError:
    """The sentence and the remedy for a TLS connection that failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionLostError(
            f"the certificate of the PACS is not accepted: {error.verify_message}",
            remedy="Give its authority as `ca_file` in [source.tls], and the host by the name it certifies.",
        )
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "HANDSHAKE_FAILURE" in reason:
        return ConnectionLostError(
            "the PACS does not accept this site's certificate",
            remedy="Check `certificate` and `key` in [source.tls], and that the PACS trusts their authority.",
        )
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNEXPECTED_MESSAGE"):
        return ConnectionLostError(
            "the PACS does not speak TLS on this port",
            remedy="Give the port that the PACS uses for TLS, or remove [source.tls].",
        )
    return ConnectionLostError(
        f"the TLS connection to the PACS failed ({reason or type(error).__name__})",
        remedy="Ask the PACS administrator which TLS versions and certificates it takes.",
    )
