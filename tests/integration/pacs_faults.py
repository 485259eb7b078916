"""What goes wrong between a site and its PACS, made to happen: real sockets, real bytes, chosen moments."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.integration.pacs import HTTP_PORT


@contextmanager
def relay(port: int, target: int, after_bytes: int, then: Callable[[], None]) -> Iterator[None]:
    """Pass connections from one port of this machine to another, and do something in the middle of it.

    Args:
        port: where to listen.
        target: where to pass to.
        after_bytes: that went through, both ways and over all connections.
        then: done once, at that moment, while everything waits.
    """
    running = _Relay(port, target, after_bytes, then)
    try:
        yield
    finally:
        running.stop()


class _Relay:
    def __init__(self, port: int, target: int, after_bytes: int, then: Callable[[], None]) -> None:
        self._target, self._left, self._then = target, after_bytes, then
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._ends = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def stop(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _start(self, work: Callable[..., None], *given: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=given))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket()
                # What is under way when a PACS is killed still arrives; let that be little.
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                try:
                    far.connect(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    far.close()
                    continue
                self._ends += (near, far)
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                with self._lock:
                    due = self._left > 0 >= self._left - len(data)
                    self._left -= len(data)
                    if due:
                        self._then()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Answer:
    """An HTTP answer on its way through a `Gateway`."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None


Rule = Callable[[str, dict[str, str], Callable[[], Answer]], Answer]
"""Given a request's path, its headers, and a way to ask the PACS: what the site gets to see."""


@dataclass
class Gateway:
    """An HTTP gateway in front of the PACS that follows a rule; it runs while open with `with`."""

    port: int
    rule: Rule = lambda path, headers, ask: ask()
    tls: ssl.SSLContext | None = None
    paths: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/dicom-web"

    def __enter__(self) -> Gateway:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gateway.paths.append(self.path)
                headers = dict(self.headers.items())
                answer = gateway.rule(self.path, headers, lambda: _ask(self.path, headers))
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut_after])
                self.close_connection = answer.cut_after is not None

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # strangers hang up
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _ask(path: str, headers: dict[str, str]) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        kind = answer.headers.get("Content-Type", "")
        return Answer(answer.status, {"Content-Type": kind}, answer.read())
    finally:
        connection.close()


@dataclass(frozen=True)
class Certificates:
    """An authority's files: its own certificate, and certificates with keys issued by it."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


def asking_for_certificates(certificates: Certificates) -> ssl.SSLContext:
    """TLS of a server that lets in only whom the authority knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate("pacs"), certificates.key("pacs"))
    context.load_verify_locations(certificates.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def make_certificates(folder: Path, *names: str) -> Certificates:
    """Make an authority and a certificate for 127.0.0.1 and localhost for each name."""
    folder.mkdir()
    ca_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {folder.name}")])
    authority = _builder(subject, subject, ca_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    made = Certificates(folder)
    made.ca.write_bytes(authority.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        places = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        certificate = (
            _builder(own, subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName(places), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        made.certificate(name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made.key(name).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        made.key(name).chmod(0o600)
    return made


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
