"""HTTP towards a PACS: our TLS, our credentials, bounded answers, and faults that say what to do.

Nothing is taken from the environment (proxies, .netrc, other authorities). A redirect is refused: it would
carry credentials, and later images, somewhere else. No text of an answer reaches an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth

from fedward_client.sources.access import PacsAwayError, client_context, connect, handshake, read_secret
from fedward_client.sources.settings import DicomwebConfig
from fedward_common.errors import CohortError, ConnectionLostError, FederationError, IdentityError, UsageError

MAX_SEARCH_BYTES = 64 * 2**20
"""Of one answer to a search; a page of 500 studies has under 1 MB."""

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_PIECE = 256 * 2**10
_MAX_WAIT_S = 120.0

for _name in ("dicomweb_client", "urllib3", "requests"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)  # they log addresses that hold UIDs


class AnswerError(CohortError):
    """The PACS answered a request with something other than success.

    Args:
        status: of HTTP.
    """

    def __init__(self, message: str, *, remedy: str, status: int) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


class _BearerToken(AuthBase):
    """Shows a token that is read anew each time, because tokens are renewed while we run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {read_secret(self._path)}"
        return request


class _OurTls(HTTPAdapter):
    """Uses exactly one TLS context: requests on its own would add the authorities it ships with."""

    def __init__(self, config: DicomwebConfig) -> None:
        self._context = client_context(config.tls) if config.is_encrypted else None
        super().__init__()

    def init_poolmanager(self, *positional: Any, **named: Any) -> None:
        super().init_poolmanager(*positional, **named, ssl_context=self._context)

    def cert_verify(self, *_: Any) -> None:
        """Leave all to the context."""


class PacsSession(requests.Session):
    """A session with one PACS; dicomweb-client sends its searches through it.

    Raises:
        IdentityError: a secret or certificate named in the settings cannot be used.
    """

    def __init__(self, config: DicomwebConfig) -> None:
        super().__init__()
        self._config = config
        self.trust_env = False
        self.auth = _credentials(config)
        self.mount(f"{config.url.partition(':')[0]}://", _OurTls(config))
        # Compressing pixels costs a PACS ten times more than sending them.
        self.headers["Accept-Encoding"] = "identity"

    def request(self, method: str, url: str, **named: Any) -> requests.Response:  # type: ignore[override]
        """Send one request of dicomweb-client and read its answer, up to `MAX_SEARCH_BYTES`.

        Raises:
            FederationError: as `open` does; CohortError when the answer is too long.
        """
        headers = {name: value for name, value in (named.get("headers") or {}).items() if name != "Host"}
        with self.open(url, headers, method) as answer:
            content = bytearray()
            for piece in self.pieces(answer):
                content += piece
                if len(content) > MAX_SEARCH_BYTES:
                    raise CohortError(
                        "the PACS answers a search with far more than was asked for",
                        remedy="Narrow the cohort's filters, or ask the PACS administrator.",
                    )
            answer._content = bytes(content)
            return answer

    @contextmanager
    def open(self, url: str, headers: dict[str, str], method: str = "GET") -> Iterator[requests.Response]:
        """Send a request and hand over its answer, whose body is still to come.

        Raises:
            PacsAwayError: no connection, or the PACS is busy or broken; worth trying again.
            ConnectionLostError: TLS does not come about.
            IdentityError: the PACS does not accept the credentials, or they do not suffice.
            UsageError: there is no such service at that address.
            AnswerError: any other refusal.
        """
        try:
            answer = super().request(
                method,
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=self._config.timeout_s,
            )
        except requests.RequestException:
            raise self._diagnosed() from None
        with answer:
            self._check(answer)
            yield answer

    def pieces(self, answer: requests.Response) -> Iterator[bytes]:
        """The body as it arrives.

        Raises:
            PacsAwayError: the connection ends before the body does.
        """
        try:
            yield from answer.iter_content(_PIECE)
        except requests.RequestException:
            raise _broken_off() from None

    def _check(self, answer: requests.Response) -> None:
        status = answer.status_code
        if status in (200, 204, 206):
            return
        if status in _BUSY:
            raise PacsAwayError(
                f"the PACS cannot answer at the moment (HTTP {status})",
                remedy="Try again later; if it stays, ask the PACS administrator.",
                retry_after_s=_seconds(answer.headers.get("Retry-After", "")),
            )
        raise _refusal(status, self._config)

    def _diagnosed(self) -> FederationError:
        """What is wrong with the connection, found out step by step."""
        host, port, timeout_s = self._config.host, self._config.port, self._config.timeout_s
        try:
            if self._config.is_encrypted:
                handshake(client_context(self._config.tls), host, port, timeout_s)
            else:
                connect(host, port, timeout_s).close()
        except ConnectionLostError as error:
            return error
        return _broken_off()


def _credentials(config: DicomwebConfig) -> AuthBase | None:
    if config.token_file is not None:
        read_secret(config.token_file)  # a fault in it is better known before anything is sent
        return _BearerToken(config.token_file)
    if config.user is not None and config.password_file is not None:
        return HTTPBasicAuth(config.user.encode(), read_secret(config.password_file).encode())
    return None


def _broken_off() -> PacsAwayError:
    return PacsAwayError(
        "the PACS broke off the connection in the middle of an answer",
        remedy="Run it again: what has arrived is kept, only the rest is fetched.",
    )


def _seconds(retry_after: str) -> float | None:
    return min(float(retry_after), _MAX_WAIT_S) if retry_after.isascii() and retry_after.isdigit() else None


def _refusal(status: int, config: DicomwebConfig) -> FederationError:
    how = "`token_file`" if config.token_file else "`user` and `password_file`"
    if status == 401:
        return IdentityError(
            "the PACS does not accept this site's credentials (HTTP 401)",
            remedy=f"Check {how} in [source] of site.toml.",
        )
    if status == 403:
        return IdentityError(
            "the PACS does not permit this site to search or retrieve (HTTP 403)",
            remedy="Ask the PACS administrator to give this site's account the right to read.",
        )
    if status == 407 or 300 <= status < 400:
        return UsageError(
            f"the PACS, or something in front of it, wants the request elsewhere (HTTP {status})",
            remedy="Give the service's final address as `url` in [source]; no redirect is followed.",
        )
    if status in (404, 405, 501):
        return AnswerError(
            f"there is no such DICOMweb service or object at the PACS (HTTP {status})",
            remedy="Check `url` in [source]: the address in front of /studies.",
            status=status,
        )
    return AnswerError(
        f"the PACS refuses the request (HTTP {status})",
        remedy="Ask the PACS administrator what its DICOMweb service supports.",
        status=status,
    )
