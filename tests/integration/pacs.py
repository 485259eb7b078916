"""A real PACS for tests: Orthanc with its DICOMweb plugin, in a network of its own, and studies to put in it.

Orthanc listens on every address whatever its settings say, so that it only ever runs in a network
namespace with nothing but loopback. `private_network` brings the calling thread there; whatever that
thread starts, processes as well as threads, is there too.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedward_client.sources.folder import find_files, read_content
from fedward_client.sources.refresh import refresh_source
from fedward_client.sources.retrieval import Retrieved
from fedward_client.sources.settings import DicomwebConfig, DimseConfig, RemoteConfig, Selection, spool_root
from tests.absence import do_without
from tests.deploy.confinement import network, skip_unless_possible

AE_TITLE = "ORTHANC"
OUR_AE_TITLE = "FEDSITE"
HTTP_PORT, DICOM_PORT, OUR_PORT = 18042, 14242, 14243
USER, PASSWORD = "ci", "ci-secret"
EVERYTHING = Selection(date_from=date(1990, 1, 1))
SHORT = {"first_wait_s": 0.02, "attempts": 2, "timeout_s": 10.0}
_PROGRAMS = ("Orthanc", "storescu", "getscu", "movescu")
_SYSTEM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin:/usr/local/bin"
_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)
_PATIENCE_S = 30.0

# One file of each kind of coding; each becomes an instance with UIDs of its own, because several of them
# share theirs, and Orthanc keeps the first of those only.
BUNDLED = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPEG2000.dcm",
    "JPEG-lossy.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "image_dfl.dcm",
)


def skip_unless_installed() -> None:
    """Skip, or fail under CI, where the PACS, dcmtk or network namespaces are missing."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    missing += [] if _PLUGIN.exists() else [_PLUGIN.name]
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian: orthanc orthanc-dicomweb dcmtk)"
        do_without(reason)
    skip_unless_possible()


def dcmtk(name: str) -> str:
    """Path of a program of dcmtk; pynetdicom brings some of the same names into a virtual environment."""
    found = shutil.which(name, path=_SYSTEM_PATH)
    assert found is not None  # `skip_unless_installed` has looked
    return found


@contextmanager
def private_network() -> Iterator[None]:
    """Bring the calling thread into a network that has loopback only, and back again."""
    libc = ctypes.CDLL(None, use_errno=True)
    with network() as holder, Path("/proc/thread-self/ns/net").open() as outside:
        with Path(f"/proc/{holder}/ns/net").open() as inside:
            _enter(libc, inside.fileno())
        try:
            yield
        finally:
            _enter(libc, outside.fileno())


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@dataclass
class Orthanc:
    """One Orthanc and its store; it may be stopped, killed and started again.

    Args:
        folder: for its store, configuration and log.
        settings: Orthanc's own settings, over the defaults here.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of its DICOMweb service."""
        return f"http://127.0.0.1:{HTTP_PORT}/dicom-web"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "orthanc.log"

    def start(self) -> None:
        """Start it, and wait until both its servers answer."""
        store = self.folder / "store"
        store.mkdir(parents=True, exist_ok=True)
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(_defaults(store) | dict(self.settings)))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(["Orthanc", str(path)], stdout=log, stderr=log)
        for port in (HTTP_PORT, DICOM_PORT):
            self._wait_for(port)

    def stop(self) -> None:
        """End it at once, in the middle of whatever it does (kill -9); asked nicely it takes seconds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(_PATIENCE_S)
            self.process = None

    def add(self, files: Sequence[bytes]) -> None:
        """Store DICOM files through its own REST interface."""
        for data in files:
            self.ask("/instances", data)

    def ask(self, path: str, body: bytes | None = None, method: str | None = None) -> Any:
        """One request to its REST interface, as its administrator."""
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        request = Request(
            f"http://127.0.0.1:{HTTP_PORT}{path}", body, {"Authorization": f"Basic {token}"}, method=method
        )
        with urlopen(request, timeout=_PATIENCE_S) as answer:
            return json.loads(answer.read() or b"null")

    def _wait_for(self, port: int) -> None:
        assert self.process is not None
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError(f"Orthanc does not listen on {port}")


def _defaults(store: Path) -> dict[str, Any]:
    return {
        "StorageDirectory": str(store),
        "IndexDirectory": str(store),
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "HttpPort": HTTP_PORT,
        "DicomAet": AE_TITLE,
        "DicomPort": DICOM_PORT,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowFind": False,
        "DicomAlwaysAllowGet": False,
        "DicomAlwaysAllowMove": False,
        "DicomAlwaysAllowStore": True,
        "DicomModalities": {"site": [OUR_AE_TITLE, "127.0.0.1", OUR_PORT]},
        "KeepAlive": True,
        "StableAge": 1,
        "Plugins": [str(_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False, "Ssl": False},
    }


def bundled_studies() -> list[bytes]:
    """The files inside pydicom in many codings, each an instance, series, study and patient of its own."""
    return [_with_new_uids(name) for name in BUNDLED]


def _with_new_uids(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None
    dataset = dcmread(path)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.PatientID, dataset.StudyDate = f"bundled-{name}", "20200101"  # some have none
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return encoded(dataset)


def a_study(
    num_instances: int, *, num_series: int = 1, rows: int = 32, date: str = "20240301", **elements: Any
) -> list[bytes]:
    """A synthetic CT study, uncompressed; every instance has a UID and pixels of its own.

    Args:
        num_instances: in each series.
        num_series: series of the study.
        rows: rows and columns; 2 bytes a pixel.
        date: StudyDate.
        elements: values for other elements, by DICOM keyword.
    """
    study = generate_uid()
    rng = np.random.default_rng(0)
    return [
        encoded(
            _instance(study, series, number, rng.integers(0, 4000, (rows, rows), np.int16), date, elements)
        )
        for series in [generate_uid() for _ in range(num_series)]
        for number in range(num_instances)
    ]


def _instance(
    study: str, series: str, number: int, pixels: Any, date: str, elements: Mapping[str, Any]
) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.Modality, dataset.PatientID, dataset.PatientName = "CT", "synthetic", "Synthetic^Patient"
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = date, "120000", "A1"
    dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = "1", 1, number + 1
    dataset.ImagePositionPatient = [0, 0, 2.5 * number]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [1, 1], 2.5
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def encoded(dataset: Dataset) -> bytes:
    """The dataset as a file."""
    buffer = BytesIO()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclass
class Hospital:
    """A PACS and a site beside it."""

    orthanc: Orthanc
    folder: Path

    def config(self, way: str, **changes: Any) -> RemoteConfig:
        """How the site reaches the PACS."""
        if way == "dicomweb":
            secret = self.folder / "password"
            secret.write_text(PASSWORD + "\n")
            secret.chmod(0o600)
            values = {"kind": "dicomweb", "url": self.orthanc.url, "user": USER, "password_file": secret}
            return DicomwebConfig.model_validate({**values, **SHORT, **changes})
        values = {
            "kind": "dimse",
            "host": "127.0.0.1",
            "port": DICOM_PORT,
            "pacs_ae_title": AE_TITLE,
            "ae_title": OUR_AE_TITLE,
            "retrieve": way,
            "listen": f"127.0.0.1:{OUR_PORT}",
        }
        return DimseConfig.model_validate({**values, **SHORT, **changes})

    def home(self, name: str) -> Path:
        """A site's home; the same name is the same home."""
        path = self.folder / "homes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def refresh(
        self, way: str, selection: Selection = EVERYTHING, *, full: bool = False, **changes: Any
    ) -> Retrieved:
        """Bring the spool of the home called like the way up to date."""
        return refresh_source(self.config(way, **changes), self.home(way), selection, full=full)

    def files(self, name: str) -> dict[str, bytes]:
        """What the site with this home has: SOPInstanceUID -> file."""
        root = spool_root(self.home(name))
        contents = [read_content(root, each.name).data for each in find_files(root)]
        return {uid_of(data): data for data in contents if data is not None}


def uid_of(data: bytes) -> str:
    """SOPInstanceUID of a file."""
    return str(dcmread(BytesIO(data), stop_before_pixels=True).SOPInstanceUID)


def pixels_of(data: bytes) -> str:
    """Digest of a file's pixels as they are coded; how a codestream is cut into fragments plays no part."""
    dataset = dcmread(BytesIO(data))
    pixels = dataset.PixelData
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        frames = generate_frames(pixels, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
        pixels = b"".join(frame.rstrip(b"\0") for frame in frames)
    return hashlib.sha256(pixels).hexdigest()


def everything_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]
