"""Python loads this at the start of every process that has its folder in PYTHONPATH: a tap on a site.

The processes themselves are the installed ones, unchanged. In the folder named by FEDWARD_TAP each leaves
what it handed to TLS, before encryption (PID.tls), and every address it connected or sent to (PID.peers).

FEDWARD_LEAK names a site's home and makes that site leak: the positive control. Patient numbers, file
names, pixels and hashes then travel past the outbound door in several spellings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Only these put bytes on a network from Python; the hook sees them in every thread and library.
_NETWORK = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})


def _tap(folder: Path) -> None:
    import ssl

    sent = (folder / f"{os.getpid()}.tls").open("ab", buffering=0)
    peers = (folder / f"{os.getpid()}.peers").open("ab", buffering=0)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # A pair of sockets leads to the process's own decoders, and to nobody else.
        paired = event == "socket.sendmsg" and arguments[1] is None and arguments[0].family.name == "AF_UNIX"
        if event in _NETWORK and not paired:
            peers.write(f"{event} {arguments[1]!r}\n".encode())

    def tapped(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def record(self: Any, data: Any, *rest: Any) -> Any:
            sent.write(memoryview(data).cast("B"))
            return original(self, data, *rest)

        setattr(owner, name, record)

    tapped(ssl.SSLSocket, "send")  # sendall and sendfile go through it
    tapped(ssl.SSLSocket, "write")
    tapped(ssl.SSLObject, "write")
    sys.addaudithook(hook)


def _leak(home: Path) -> None:
    import base64
    import hashlib
    import sqlite3
    from dataclasses import replace

    from flwr.app import ConfigRecord, RecordDict

    import fedward_client.app as client_app
    from fedward_client.outbound import OutboundDoor
    from fedward_common.protocol import Up, up_content

    def patient_and_file() -> tuple[str, Path]:
        with sqlite3.connect(home / "index.sqlite") as index:
            patient, name = index.execute(
                "SELECT patient, name FROM files JOIN contents USING (content)"
                " WHERE radiograph_reason IS NULL AND patient IS NOT NULL ORDER BY name"
            ).fetchone()
        (folder,) = [
            line.split('"')[1] for line in (home / "site.toml").read_text().splitlines() if "dicom" in line
        ]
        return patient, Path(folder) / os.fsdecode(name)

    honest = OutboundDoor._send

    def leaky_door(self: OutboundDoor, *arguments: Any) -> Up:
        up = honest(self, *arguments)
        patient, path = patient_and_file()
        note = f',"why":"no cases for {patient}"}}'.encode()
        sys.stderr.write(f"debug {path}\n".encode().hex())
        sys.stderr.flush()
        payload = up.payload
        if payload is not None:
            file = path.read_bytes()
            pixels = file[file.index(b"\xe0\x7f\x10\x00") :]
            payload = pixels[: len(payload)].ljust(len(payload), b"\0")
        return replace(up, envelope=up.envelope[:-1] + note, payload=payload)

    def leaky_content(up: Up) -> RecordDict:
        patient, path = patient_and_file()
        content = up_content(up)
        content["error"] = ConfigRecord(
            {
                "text": base64.b64encode(f"FileNotFoundError: {path}".encode()),
                "case": hashlib.sha256(patient.encode()).hexdigest(),
                "wide": patient.encode("utf-16-le"),
            }
        )
        return content

    OutboundDoor._send = leaky_door  # type: ignore[method-assign,assignment]
    client_app.up_content = leaky_content  # type: ignore[attr-defined]


if "FEDWARD_TAP" in os.environ:
    _tap(Path(os.environ["FEDWARD_TAP"]))
# The daemon alone holds the door: its worker is started with its own module's name.
if "FEDWARD_LEAK" in os.environ and "fedward_client.worker" not in sys.orig_argv:
    _leak(Path(os.environ["FEDWARD_LEAK"]))
