"""Index a folder of headers, against bare pydicom over the same number of processes.

One folder of synthetic files, half radiographs and half CT slices, with the elements that a hospital's
files have (about ninety, sequences and private ones among them). In the same run, by turns:

* `pydicom`: list the folder, then `dcmread(stop_before_pixels=True)` on each file, in a pool of processes.
  No value is used and nothing is kept;
* `index`: `index_folder` into an empty home. It also hashes every file, reads some fifty values, judges
  the image, gathers what the gate and the volumes need, and commits all of it;
* `again`: `index_folder` of the same folder, of which nothing changed.

`..._against_...` are ratios of speeds, 1 being equal; `_cpu` compares processor seconds, which other work
on the machine hardly changes. `memory_mb` is the most that the indexing process and its children held
together (resident pages, those they share counted in each).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.surroundings import machine, versions  # noqa: E402

_PER_FOLDER = 1000
_UID_TAIL = 24


def make_files(folder: Path, num_files: int) -> None:
    """Write the files; each is a template with UIDs, place and pixels of its own."""
    templates = [_template(kind) for kind in ("CR", "CT")]
    for number in range(num_files):
        where = folder / f"{number // _PER_FOLDER:04d}"
        if number % _PER_FOLDER == 0:
            where.mkdir(parents=True)
        data = templates[number % 2]
        series = number // 200
        for mark, value in (
            (b"7" * _UID_TAIL, b"%0*d" % (_UID_TAIL, number + 1)),
            (b"8" * _UID_TAIL, b"%0*d" % (_UID_TAIL, series + 1)),
            (b"9" * _UID_TAIL, b"%0*d" % (_UID_TAIL, series + 1)),
            (b"P00000000000", b"P%011d" % (series // 2)),
            (b"-100.000", b"%+08.3f" % ((number // 2 % 100) * 2.5)),
            (b"PIXELMARK!", b"%010d" % number),
        ):
            data = data.replace(mark, value.replace(b"+", b" "))
        (where / f"{number:08d}.dcm").write_bytes(data)


def _template(kind: str) -> bytes:
    from pydicom.dataset import Dataset

    from tests.builders import a_dataset, encode

    dataset = a_dataset(Modality="CR", PatientID="P00000000000")
    if kind == "CT":
        dataset.SOPClassUID, dataset.Modality = "1.2.840.10008.5.1.4.1.1.2", "CT"
        dataset.ImagePositionPatient = [-120.5, -131.25, "-100.000"]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = -1024, 1, "HU"
        dataset.SliceThickness, dataset.KVP, dataset.GantryDetectorTilt = 2.5, 120, 0
        dataset.FrameOfReferenceUID = f"1.2.840.99999.4.{'8' * _UID_TAIL}"
    dataset.SOPInstanceUID = f"1.2.840.99999.1.{'7' * _UID_TAIL}"
    dataset.SeriesInstanceUID = f"1.2.840.99999.2.{'8' * _UID_TAIL}"
    dataset.StudyInstanceUID = f"1.2.840.99999.3.{'9' * _UID_TAIL}"
    dataset.PixelSpacing = [0.7, 0.7]
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = "20190304"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "101112.13"
    for keyword in _TEXTS:
        setattr(dataset, keyword, keyword[:16].upper())
    for keyword in ("SeriesNumber", "InstanceNumber", "AcquisitionNumber", "ExposureTime", "XRayTubeCurrent"):
        setattr(dataset, keyword, 4)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientSex, dataset.PatientAge, dataset.PatientBirthDate = "F", "044Y", "19750102"
    dataset.PatientName, dataset.ReferringPhysicianName = "SYNTHETIC^PATIENT", "SYNTHETIC^DOCTOR"
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.ReferencedImageSequence = [item]
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "T-D3000", "SRT", "Chest"
    dataset.ProcedureCodeSequence, dataset.AnatomicRegionSequence = [code], [code]
    block = dataset.private_block(0x0019, "SYNTHETIC PRIVATE", create=True)
    for number in range(20):
        block.add_new(number, "LO", f"private value {number}")
    dataset.PixelData = b"PIXELMARK!" + bytes(dataset.Rows * dataset.Columns - 10)
    return encode(dataset)


_TEXTS = (
    *("AccessionNumber", "Manufacturer", "InstitutionName", "InstitutionAddress", "StationName"),
    *("StudyDescription", "SeriesDescription", "ManufacturerModelName", "ProtocolName", "BodyPartExamined"),
    *("DeviceSerialNumber", "SoftwareVersions", "PatientPosition", "StudyID", "PatientComments"),
    *("RequestedProcedureDescription", "PerformedProcedureStepDescription", "ConvolutionKernel"),
    *("FilterType", "OperatorsName", "PhysiciansOfRecord", "IssuerOfPatientID", "ViewPosition"),
)


def read_header(path: str) -> int:
    """What is measured against."""
    from pydicom import dcmread

    return len(dcmread(path, stop_before_pixels=True))


def pydicom_once(folder: Path, num_processes: int) -> tuple[float, float]:
    """Seconds, and processor seconds, that bare pydicom takes for the folder."""
    started, used = time.perf_counter(), _used_s()
    paths = (str(Path(where) / name) for where, _, names in os.walk(folder) for name in names)
    with multiprocessing.get_context("spawn").Pool(num_processes, _warm) as pool:
        total = sum(1 for size in pool.imap_unordered(read_header, paths, chunksize=200) if size)
        pool.close()
        pool.join()
    assert total
    return time.perf_counter() - started, _used_s() - used


def _used_s() -> float:
    """Processor seconds of this process and of all its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _warm() -> None:
    import pydicom  # noqa: F401


_INDEX = """
import json, resource, sys, time
from pathlib import Path
from fedward_client.decoders import _decoders
from fedward_client.index import index_folder
from fedward_client.site_data import SiteData
home, dicom, num = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
started, used = time.perf_counter(), time.process_time()
summary = index_folder(SiteData(home, dicom, home / "labels.csv"), num_processes=num)
took = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - used}
_decoders.close()  # only what has ended is counted
readers = resource.getrusage(resource.RUSAGE_CHILDREN)
took["cpu_s"] += readers.ru_utime + readers.ru_stime
counts = {"read": summary.num_read, "files": summary.num_files, "quarantined": dict(summary.quarantined)}
print(json.dumps(took | counts))
"""


def index_once(home: Path, folder: Path, num_processes: int) -> dict[str, Any]:
    """Index in a process of its own; its figures, and the memory of it and its children in MB."""
    command = [sys.executable, "-c", _INDEX, str(home), str(folder), str(num_processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        most = 0.0
        while process.poll() is None:
            most = max(most, _resident_mb(process.pid))
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        assert process.stdout is not None
        document: dict[str, Any] = json.loads(process.stdout.read())
    assert process.returncode == 0
    return document | {"memory_mb": most}


def _resident_mb(pid: int) -> float:
    return sum(map(_own_mb, _tree(pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _own_mb(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: Path, num_processes: int, laps: int) -> dict[str, Any]:
    """All figures over a folder."""
    names = ("pydicom_s", "pydicom_cpu_s", "index_s", "index_cpu_s", "again_s", "memory_mb")
    found: dict[str, list[float]] = {name: [] for name in names}
    document: dict[str, Any] = {}

    def bare() -> None:
        wall_s, cpu_s = pydicom_once(folder, num_processes)
        found["pydicom_s"].append(wall_s)
        found["pydicom_cpu_s"].append(cpu_s)

    for lap in range(laps):
        home = Path(tempfile.mkdtemp(prefix="home", dir=folder.parent))
        if lap % 2 == 0:
            bare()
        document = index_once(home, folder, num_processes)
        found["index_s"].append(document["s"])
        found["index_cpu_s"].append(document["cpu_s"])
        found["memory_mb"].append(document["memory_mb"])
        if lap % 2 == 1:
            bare()
        again = index_once(home, folder, num_processes)
        assert again["read"] == 0
        found["again_s"].append(again["s"])
        shutil.rmtree(home)
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "files": document["files"],
        "processes": num_processes,
        "quarantined": document["quarantined"],
        "laps": {name: [round(value, 3) for value in values] for name, values in found.items()},
        "index_against_pydicom": round(middle["pydicom_s"] / middle["index_s"], 3),
        "index_against_pydicom_cpu": round(middle["pydicom_cpu_s"] / middle["index_cpu_s"], 3),
        "again_against_index": round(middle["index_s"] / middle["again_s"], 1),
        "memory_mb": round(max(found["memory_mb"])),
        "files_per_s": round(document["files"] / middle["index_s"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description="Indexing against bare pydicom.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are, or are to be kept")
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedward-indexing") as scratch:
        folder = given.folder or Path(scratch) / "dicom"
        if not folder.exists():
            make_files(folder, given.files)
        figures = measure(folder.resolve(), given.processes, given.laps)
    print(json.dumps({"versions": versions(), "machine": machine(), **figures}))


if __name__ == "__main__":
    main()
