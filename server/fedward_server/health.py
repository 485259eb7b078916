"""Say whether a server on this machine answers: `python -m fedward_server.health`.

For container health checks and monitoring. It completes a TLS handshake with both listeners against the
federation's authority, so it fails when a listener hangs (a bare connect would still succeed), when the
certificate has expired, and when another program has the port. It shows no certificate and so needs no
key: in TLS 1.3 a listener refuses such a visitor only after the handshake. Standard library only,
because it runs every half minute beside a server that has better uses for the memory.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

CA_FILE = Path("/var/lib/fedward/identity/ca.crt")
TIMEOUT_S = 5.0


def faults(
    ca: Path, ports: Sequence[int], *, host: str = "127.0.0.1", timeout_s: float = TIMEOUT_S
) -> list[str]:
    """Try every listener and say what is wrong, one sentence a fault; none when the server is well.

    Args:
        ca: certificate of the federation's authority.
        ports: listeners to try.
        host: address they listen on; names in the certificate are not compared with it.
        timeout_s: for each step of each listener.
    """
    try:
        context = _context(ca)
    except (OSError, ssl.SSLError) as error:
        return [f"cannot read the authority's certificate {ca}: {error.strerror or error}"]
    found = []
    for port in ports:
        try:
            with (
                socket.create_connection((host, port), timeout=timeout_s) as plain,
                context.wrap_socket(plain),
            ):
                pass
        except ssl.SSLCertVerificationError as error:
            found.append(f"port {port}: certificate not accepted: {error.verify_message}")
        except (OSError, ssl.SSLError) as error:
            found.append(f"port {port}: {error.strerror or error}")
    return found


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.check_hostname = False  # the certificate names the server's public address, not loopback
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC talks to none that does not offer h2
    context.load_verify_locations(cafile=ca)
    return context


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print what is wrong, and return 0 (well) or 1."""
    parser = argparse.ArgumentParser(
        prog="python -m fedward_server.health", description="Exit 0 if the server on this machine answers."
    )
    parser.add_argument(
        "--ca", type=Path, default=CA_FILE, help="authority's certificate (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the listeners (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=int,
        action="append",
        dest="ports",
        help="listener to try; may be given more than once (default: 8443 and 8444)",
    )
    options = parser.parse_args(arguments)
    found = faults(options.ca, options.ports or (8443, 8444), host=options.host)
    sys.stdout.writelines(f"{fault}\n" for fault in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
