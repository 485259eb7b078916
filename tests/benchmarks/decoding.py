"""Decoding in the sandbox beside decoding in this process, and beside bare pydicom and NumPy.

Real images, as they are and in the compressed forms in which archives keep them: CT slices, a radiograph of
1760 x 1760, enhanced MR. Three ways take turns, file by file within each lap, with warm files:

* `bare`: `pydicom.dcmread`, `pixel_array`, rescale to float32;
* `in_process`: read, hash, `decode_frames` (and for radiographs `decode_image`);
* `sandbox`: the same through `DecodeSandbox` with one process, pixels lent in shared memory, which is how
  images are prepared for training.

`overhead` is the sandbox's time over that in this process, less 1; `cpu_overhead` the same in processor time
of both sides; `share` is bare time over time in this process. Medians of laps, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pydicom import dcmread, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fedward_client.dicom.frames import decode_frames  # noqa: E402
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile  # noqa: E402
from tests.benchmarks.surroundings import machine, require_shared  # noqa: E402

CT = "dicom-vendors/ct_philips_phantom"
MR = "dicom-vendors/mr_siemens_vida_via_siemens"
RADIOGRAPH = "dicom-varied/pydicom-data/RG3_J2KR.dcm"


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("FEDWARD_DATA", ROOT.parent / "shared" / "data"))
    )
    given = parser.parse_args()
    require_shared(data=given.data / RADIOGRAPH)
    with tempfile.TemporaryDirectory(prefix="fedward-bench-") as name:
        kinds = prepare(given.data, Path(name))
        with DecodeSandbox() as sandbox:
            figures = {kind: measure(sandbox, paths, given.laps) for kind, paths in kinds.items()}
    together = {way: sum(each[f"{way}_ms"] for each in figures.values()) for way in _WAYS}
    print(
        json.dumps(
            {
                "benchmark": "decoding",
                "machine": machine(),
                "versions": {name: version(name) for name in ("pydicom", "numpy", "pylibjpeg-openjpeg")},
                "laps": given.laps,
                "kinds": figures,
                "all_kinds": {
                    "overhead": round(together["sandbox"] / together["in_process"] - 1, 3),
                    "median_overhead": round(median(each["overhead"] for each in figures.values()), 3),
                    "share": round(together["bare"] / together["in_process"], 3),
                    "share_in_sandbox": round(together["bare"] / together["sandbox"], 3),
                },
            },
            indent=2,
        )
    )


def prepare(data: Path, folder: Path) -> dict[str, list[Path]]:
    """Write each kind's files."""
    slices = sorted((data / CT).glob("*.dcm"))
    kinds = {
        "ct": slices,
        "ct_rle": recoded(slices, RLELossless, folder / "ct_rle"),
        "ct_jpeg_ls": recoded(slices[:8], JPEGLSLossless, folder / "ct_jpeg_ls"),
        "ct_jpeg2000": recoded(slices[:8], JPEG2000Lossless, folder / "ct_jpeg2000"),
        "radiograph": recoded([data / RADIOGRAPH] * 4, ExplicitVRLittleEndian, folder / "radiograph"),
        "radiograph_jpeg2000": [data / RADIOGRAPH] * 2,
        "enhanced_mr": sorted((data / MR).glob("*.dcm")),
    }
    for kind, paths in kinds.items():
        if not paths:
            raise SystemExit(
                f"{data} holds no images for {kind}: give the folder of the real data with --data."
            )
    return kinds


def recoded(paths: Sequence[Path], syntax: str, folder: Path) -> list[Path]:
    """Copies in another transfer syntax."""
    folder.mkdir()
    written = []
    for number, path in enumerate(paths):
        dataset = dcmread(path)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            dataset.decompress()
        if syntax != ExplicitVRLittleEndian:
            dataset.compress(syntax, generate_instance_uid=False)
        written.append(folder / f"{number}.dcm")
        dcmwrite(written[-1], dataset)
    return written


def bare(path: Path) -> object:
    dataset = dcmread(io.BytesIO(path.read_bytes()))
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return dataset.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def in_process(path: Path) -> object:
    data = path.read_bytes()
    hashlib.sha256(data).hexdigest()
    return decode_frames(data)


def one_by_one(decode: Callable[[Path], object], paths: Sequence[Path]) -> None:
    """Decode each and let go of it, so that nobody pays for pages that another does not need."""
    for path in paths:
        decode(path)


_WAYS = ("bare", "in_process", "sandbox")


def measure(sandbox: DecodeSandbox, paths: Sequence[Path], laps: int) -> dict[str, Any]:
    """Medians over laps, in ms an image."""
    files = [SiteFile(path.parent, path.name.encode()) for path in paths]

    def through_sandbox() -> None:
        for outcome in sandbox.map(files, "frames", lend=True):
            if isinstance(outcome, Exception):
                raise outcome

    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: one_by_one(bare, paths),
        "in_process": lambda: one_by_one(in_process, paths),
        "sandbox": through_sandbox,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for lap in range(laps + 1):  # the first warms up
        for way, run in ways.items():
            busy, start = processor_seconds(sandbox), time.perf_counter()
            run()
            if lap:
                seconds[way].append(time.perf_counter() - start)
                processor[way].append(processor_seconds(sandbox) - busy)
    ms = {way: 1000 * median(found) / len(paths) for way, found in seconds.items()}
    busy_of = {way: sum(found) for way, found in processor.items()}
    return {
        "images": len(paths),
        **{f"{way}_ms": round(found, 3) for way, found in ms.items()},
        "overhead": round(median(np.divide(seconds["sandbox"], seconds["in_process"])) - 1, 3),
        "cpu_overhead": round(busy_of["sandbox"] / busy_of["in_process"] - 1, 3),
        "share": round(median(np.divide(seconds["bare"], seconds["in_process"])), 3),
    }


def processor_seconds(sandbox: DecodeSandbox) -> float:
    """Of this process and the decoder processes."""
    total = time.process_time()
    for pid in sandbox.pids:
        total += int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    return total


if __name__ == "__main__":
    main()
