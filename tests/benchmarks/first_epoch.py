"""From files to batches, first and later epochs, against bare pydicom plus NumPy and against MONAI.

Synthetic radiographs (12 bits in 16) are brought to float32 `(1, size, size)`: decode, window, resize. The
same files for all, in the same run, by turns. Over as many processes as there are cores, all of them
started and warm:

* `bare_s`: pydicom's `pixel_array`, NumPy's window and block means, in a pool; nothing is kept or sent;
* `monai_s`: `LoadImaged(PydicomReader)`, `ScaleIntensityRanged`, `Resized("area")` in a `DataLoader`;
* `persistent_first_s`: the same in a `PersistentDataset` whose folder is empty;
* `first_s`: `open_dicom_folder` with an empty cache: check the index, join the labels, decode in the
  sandbox, transform, write the cache to the disk and wait until it is there.

And in one process, batches of 32 in a random order:

* `bare_one_s`, `monai_one_s`: as above;
* `persistent_s`: MONAI's `PersistentDataset` when all its files are there;
* `later_s`: our cache, mapped from disk;
* `decoder_one_s`, JPEG 2000 only: OpenJPEG alone, the codestreams being in memory. All decoders of this
  format that are installed are OpenJPEG (imagecodecs', Pillow's and GDCM's copies of it take 0.93 to 1.5
  times the processor time of this one), so `most_over_monai_per_core`, MONAI's processor time over this
  one, is what `first_over_monai_per_core` would be if nothing but decoding took any time.

Every file lies in the system's cache, so disks are not measured. Beside the clock stand the processor
seconds of all processes that took part: "per core" is what they say, and on a machine that does other
work at the same time they are the ones to look at.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.surroundings import machine, versions  # noqa: E402

BATCH = 32
HIGHEST = 4095
SYNTAXES = {"uncompressed": "1.2.840.10008.1.2.1", "jpeg2000": "1.2.840.10008.1.2.4.90"}


def make_site(folder: Path, num_files: int, side: int, syntax: str) -> Any:
    """Write a site of that many radiographs, one a patient, all for training."""
    from fedward_client.site_data import SiteData
    from tests.builders import a_dataset, a_uid, encode, write_labels

    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir(parents=True)
    site.dicom.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    rows = []
    for number in range(num_files):
        smooth = 2000 + 1500 * np.sin(3 * x + number) * np.cos(4 * y)
        pixels = np.clip(smooth + random.normal(0, 40, (side, side)), 0, HIGHEST).astype(np.uint16)
        uid = a_uid(f"image {number}")
        dataset = a_dataset(pixels, PatientID=f"P{number}", SOPInstanceUID=uid, BitsStored=12, HighBit=11)
        dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
        if syntax != SYNTAXES["uncompressed"]:
            dataset.compress(syntax, generate_instance_uid=False)
        (site.dicom / f"{number:06d}.dcm").write_bytes(encode(dataset, syntax))
        rows.append([uid, number % 2, "train"])
    write_labels(site.labels, rows, ("SOPInstanceUID", "label", "split"))
    return site


def bare(path: str, size: int) -> NDArray[np.float32]:
    """What a script of ten lines does; pydicom decodes with the first plugin it finds."""
    from pydicom import dcmread

    dataset = dcmread(path)
    values = dataset.pixel_array.astype(np.float32)
    low = float(dataset.WindowCenter) - float(dataset.WindowWidth) / 2
    shown = np.clip((values - np.float32(low)) / np.float32(dataset.WindowWidth), 0, 1)
    block = shown.shape[0] // size
    means: NDArray[np.float32] = shown.reshape(size, block, size, block).mean(axis=(1, 3))
    return means[None] * 2 - 1


def bare_in_pool(job: tuple[str, int]) -> int:
    """One file in the pool."""
    return bare(*job).size


def monai_pipeline(size: int) -> Any:
    """MONAI's reader and the same arithmetic."""
    from monai.data.image_reader import PydicomReader
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import ScaleIntensityRanged
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.dictionary import Resized
    from monai.transforms.utility.dictionary import EnsureChannelFirstd, SelectItemsd, ToTensord

    return Compose(
        [
            LoadImaged("image", reader=PydicomReader),
            EnsureChannelFirstd("image"),
            ScaleIntensityRanged("image", 0, HIGHEST, -1, 1, clip=True),
            Resized("image", (size, size), mode="area"),
            ToTensord("image", track_meta=False),
            SelectItemsd("image"),  # with more, PersistentDataset cannot read its own files back
        ]
    )


def monai_batches(dataset: Any, num_workers: int) -> Any:
    """A `DataLoader` whose workers stay."""
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )


def the_plan(size: int) -> Any:
    """A plan that takes all images for training."""
    from tests.builders import a_plan

    return a_plan(transforms={"name": "chest_xray", "size": (size, size)})


def first_epoch(site: Any, size: int) -> Any:
    """Prepare everything anew; the index is there, and `forget` was called."""
    from fedward_client.dataset import open_dicom_folder

    return open_dicom_folder(the_plan(size), site)


def forget(site: Any) -> None:
    """Delete what was prepared, with the disk at rest afterwards; nobody does this before a first epoch."""
    shutil.rmtree(site.home / "cache", ignore_errors=True)
    os.sync()


def later_epoch(images: Any, seed: int) -> int:
    """Take all images in batches, in a random order."""
    import torch

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = order.split(BATCH)  # type: ignore[no-untyped-call]
    return sum(len(images[batch]) for batch in batches)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor in this process and its children, which stay."""
    clock, processor = time.perf_counter(), processor_s()
    work()
    return time.perf_counter() - clock, processor_s() - processor


def processor_s() -> float:
    """Processor seconds of this process and of those that it started, directly or not."""
    ticks = 0
    for pid in tree(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> Iterator[int]:
    """A process and what it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def codestreams(paths: Iterable[str]) -> list[bytes]:
    """The one frame of each compressed file."""
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    return [next(generate_frames(dcmread(path).PixelData, number_of_frames=1)) for path in paths]


def decode_alone(frames: Iterable[bytes]) -> int:
    """Run the decoder that the sandbox has, and nothing else."""
    from openjpeg.utils import decode_pixel_data

    return sum(len(decode_pixel_data(frame, version=2)) for frame in frames)


def empty(folder: Path) -> None:
    """Delete a folder's files."""
    for path in folder.iterdir():
        path.unlink()
    os.sync()


def consume(items: Iterable[object]) -> int:
    """Take everything."""
    return sum(1 for _ in items)


def measure(folder: Path, syntax: str, args: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """All figures of one kind of file."""
    import torch
    from monai.data.dataset import Dataset, PersistentDataset

    from fedward_client import dataset as dataset_module
    from fedward_client import decoders as decoders_module

    num_files = args.files if syntax == "uncompressed" else max(args.files // 8, 2 * BATCH)
    site = make_site(folder / syntax, num_files, args.side, SYNTAXES[syntax])
    paths = sorted(map(str, site.dicom.iterdir()))
    items = [{"image": path} for path in paths]
    pipeline = monai_pipeline(args.size)
    many = monai_batches(Dataset(items, pipeline), args.processes)
    one = monai_batches(Dataset(items, pipeline), 0)
    persistent = monai_batches(PersistentDataset(items, pipeline, folder / f"{syntax}-monai"), 0)
    new = folder / f"{syntax}-monai-first"
    persistent_first = monai_batches(PersistentDataset(items, pipeline, new), args.processes)
    warnings.filterwarnings("error", message="Corrupt cache file")  # as if nothing had been kept
    decoders_module._IDLE_S = 3600.0  # they stay as MONAI's workers do, also on a slow machine
    dataset_module._available_bytes = lambda: 0  # what fits into memory would need no cache to be fast

    torch.set_num_threads(args.processes)
    images = first_epoch(site, args.size).train.images  # the index, and decoders that are warm
    work: dict[str, Callable[[], object]] = {
        "bare_s": lambda: consume(
            pool.imap_unordered(bare_in_pool, [(path, args.size) for path in paths], chunksize=8)
        ),
        "monai_s": lambda: consume(many),
        "persistent_first_s": lambda: consume(persistent_first),
        "first_s": lambda: first_epoch(site, args.size),
        "bare_one_s": lambda: consume(bare(path, args.size) for path in paths),
        "monai_one_s": lambda: consume(one),
        "persistent_s": lambda: consume(persistent),
        "later_s": lambda: later_epoch(images, 0),
    }
    if syntax != "uncompressed":
        frames = codestreams(paths)
        work["decoder_one_s"] = lambda: decode_alone(frames)
    before = {"first_s": lambda: forget(site), "persistent_first_s": lambda: empty(new)}
    seconds, processor = by_turns(work, before, args)
    return {"images": num_files, **figures(num_files, seconds, processor)}


Laps = dict[str, list[float]]


def by_turns(
    work: dict[str, Callable[[], object]], before: dict[str, Callable[[], None]], args: argparse.Namespace
) -> tuple[Laps, Laps]:
    """Do all kinds of work lap by lap; seconds of each by the clock, and of the processor."""
    import torch

    seconds: Laps = {name: [] for name in work}
    processor: Laps = {name: [] for name in work}
    for lap in range(args.laps + 1):
        for name in list(work)[:: 1 if lap % 2 else -1]:
            alone = "one" in name or name in ("persistent_s", "later_s")
            torch.set_num_threads(1 if alone else args.processes)
            before.get(name, bool)()
            took, used = timed(work[name])
            if lap:  # the first fills caches
                seconds[name].append(took)
                processor[name].append(used)
    return seconds, processor


def figures(num_files: int, seconds: Laps, processor: Laps) -> dict[str, Any]:
    """Rates and ratios of medians."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    used_by = {name: statistics.median(values) for name, values in processor.items()}
    found: dict[str, Any] = {
        "seconds": seconds,
        "processor_seconds": processor,
        "images_per_s": {name: round(num_files / value, 1) for name, value in median.items()},
        "first_over_bare": median["bare_s"] / median["first_s"],
        "first_over_bare_per_core": used_by["bare_s"] / used_by["first_s"],
        "first_over_monai": median["monai_s"] / median["first_s"],
        "first_over_monai_per_core": used_by["monai_s"] / used_by["first_s"],
        "first_over_persistent": median["persistent_first_s"] / median["first_s"],
        "later_over_monai": median["monai_one_s"] / median["later_s"],
        "later_over_bare": median["bare_one_s"] / median["later_s"],
        "later_over_persistent": median["persistent_s"] / median["later_s"],
    }
    if "decoder_one_s" in used_by:
        found["most_over_monai_per_core"] = used_by["monai_s"] / used_by["decoder_one_s"]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1600, help="uncompressed files; an eighth as JPEG 2000")
    parser.add_argument("--side", type=int, default=512, help="rows and columns of a file")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of a prepared image")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--syntax", choices=tuple(SYNTAXES), action="append", help="by default both")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="first_epoch"))
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "options": vars(args)}
    try:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for syntax in args.syntax or SYNTAXES:
                document[syntax] = measure(folder, syntax, args, pool)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(document, indent=2))
        return
    for syntax in args.syntax or SYNTAXES:
        for name, value in document[syntax]["images_per_s"].items():
            print(f"{syntax:14} {name.removesuffix('_s'):12} {value:10.1f} images/s")
        for name, value in document[syntax].items():
            if "_over_" in name:
                print(f"{syntax:14} {name:26} {value:8.2f}")


if __name__ == "__main__":
    main()
