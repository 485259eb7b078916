"""Write simulated sites: a folder of valid DICOM files and a label file each (demo, tests, simulation).

Pixels are either real radiographs from an `.npz` (the official division is kept) or phantoms drawn
here. Patients, dates and UIDs are made up, from the seed: the same call writes the same bytes. Each
patient has one study of one to four images, all with one label and on one side of the split.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.file_template import FileTemplate, cr_template, dx_template, invented_patient
from fedward_client.dicom.phantom import PHANTOM_WINDOW, draw_phantom
from fedward_common.errors import UsageError

_NPZ_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_MAX_IMAGES_PER_PATIENT = 4
_MIN_TRAIN_PER_SITE = 8
_SITE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class SyntheticSite:
    """What was written for one site.

    Args:
        name: also its folder's name.
        num_patients: invented patients.
        counts: split -> label -> number of images.
    """

    name: str
    num_patients: int
    counts: Mapping[str, Mapping[int, int]]

    @property
    def num_images(self) -> int:
        """Files written."""
        return sum(sum(labels.values()) for labels in self.counts.values())


@dataclass(frozen=True)
class SyntheticSites:
    """What was written.

    Args:
        kind: one phrase for the screen and the report: which kind of data this is.
        label_names: meaning of labels 0 and 1.
        sites: in the order of the names given.
    """

    kind: str
    label_names: tuple[str, ...]
    sites: tuple[SyntheticSite, ...]


@dataclass(frozen=True)
class _Group:
    """Images of one patient, as numbers that the source of pixels understands."""

    split: str
    label: int
    images: tuple[int, ...]


def write_npz_sites(
    npz: Path,
    out: Path,
    site_names: Sequence[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    alpha: float | None = None,
) -> SyntheticSites:
    """Divide the images of a MedMNIST-like `.npz` among sites and write them as 8-bit CR files.

    Args:
        npz: arrays {train,val,test}_images uint8 (n, rows, columns) and _labels (n,) or (n, 1).
        out: folder; gets SITE/dicom/*.dcm and SITE/labels.csv for each site.
        site_names: lower-case names.
        seed: decides division, patients and UIDs.
        limit: at most this many images in all, in the proportions of the official division.
        alpha: Dirichlet concentration over labels; None divides evenly.

    Raises:
        UsageError: not such a file, a site's folder is not empty, or too few images for the sites.
    """
    images, labels = _read_npz(npz)
    generator = np.random.default_rng(seed)
    chosen = {split: _choose(len(images[split]), limit, images, generator) for split in images}
    shares = _divide(chosen, labels, len(site_names), alpha, generator)
    rows, columns = images["train"].shape[1:]
    template = cr_template(rows, columns)

    def draw(group: _Group, image: int) -> tuple[Pixels, dict[str, str]]:
        return images[group.split][image], {}

    sites = []
    for number, name in enumerate(site_names):
        groups = [
            _Group(split, label, tuple(int(index) for index in members))
            for split, share in shares[number].items()
            for label in (0, 1)
            for members in _patients(share[labels[split][share] == label], generator)
        ]
        sites.append(_write_site(out, name, groups, template, draw, seed))
    kind = f"real radiographs from {npz.name}, written as DICOM for simulated sites"
    return SyntheticSites(kind, ("normal", "pneumonia"), tuple(sites))


def write_phantom_sites(
    out: Path, site_names: Sequence[str], *, cases_per_site: int = 300, size: int = 64, seed: int = 0
) -> SyntheticSites:
    """Draw chest phantoms, half of them with a lesion, and write them as 12-bit DX files.

    Sites differ slightly in exposure and contrast; a quarter of the files are MONOCHROME1.

    Args:
        out: folder; gets SITE/dicom/*.dcm and SITE/labels.csv for each site.
        site_names: lower-case names.
        cases_per_site: images a site, 40 at least, so that each split has both labels.
        size: rows and columns.
        seed: decides all pixels, patients and UIDs.

    Raises:
        UsageError: a site's folder is not empty, or there are too few cases or pixels.
    """
    if cases_per_site < 40 or not 16 <= size <= 2048:
        raise UsageError(
            f"{cases_per_site} cases a site of {size} pixels: 40 cases and 16 to 2048 pixels are needed",
            remedy="Ask for more cases, or another size.",
        )
    template = dx_template(size, size, _WIDTH)
    sites = []
    for number, name in enumerate(site_names):
        generator = np.random.default_rng([seed, number])
        exposure, contrast = generator.uniform(-120, 120), generator.uniform(0.9, 1.1)
        split_ends = (round(0.7 * cases_per_site), round(0.85 * cases_per_site), cases_per_site)
        order = np.arange(cases_per_site)
        groups = [
            _Group(split, label, tuple(int(index) for index in members))
            for split, share in zip(_NPZ_SPLITS.values(), np.split(order, split_ends[:2]), strict=True)
            for label in (0, 1)
            for members in _patients(share[share % 2 == label], generator)
        ]

        def draw(
            group: _Group,
            image: int,
            exposure: float = exposure,
            contrast: float = contrast,
            number: int = number,
        ) -> tuple[Pixels, dict[str, str]]:
            own = np.random.default_rng([seed, number, image])
            pixels = draw_phantom(size, bool(group.label), own, exposure=exposure, contrast=contrast)
            return (4095 - pixels, _INVERSE) if image % 4 == 3 else (pixels, _IDENTITY)

        sites.append(_write_site(out, name, groups, template, draw, seed))
    return SyntheticSites("synthetic chest phantoms", ("clear", "lesion"), tuple(sites))


_CENTER, _WIDTH = PHANTOM_WINDOW
_IDENTITY = {
    "PhotometricInterpretation": "MONOCHROME2",
    "PresentationLUTShape": "IDENTITY",
    "WindowCenter": str(_CENTER),
}
_INVERSE = {
    "PhotometricInterpretation": "MONOCHROME1",
    "PresentationLUTShape": "INVERSE",
    "WindowCenter": str(4096 - _CENTER),
}


def _write_site(
    out: Path,
    name: str,
    groups: Sequence[_Group],
    template: FileTemplate,
    draw: Callable[[_Group, int], tuple[Pixels, dict[str, str]]],
    seed: int,
) -> SyntheticSite:
    folder = _empty_folder(out, name)
    counts: dict[str, dict[int, int]] = {split: {0: 0, 1: 0} for split in _NPZ_SPLITS.values()}
    num_files = 0
    with (out / name / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["SOPInstanceUID", "label", "split"])
        for number, group in enumerate(groups):
            patient = invented_patient(seed, name, number)
            for instance, image in enumerate(group.images, start=1):
                pixels, extra = draw(group, image)
                fields = patient.fields(instance) | extra
                content = template.fill(fields, pixels)
                num_files += 1
                (folder / f"{num_files:06d}.dcm").write_bytes(content)
                writer.writerow([fields["SOPInstanceUID"], group.label, group.split])
            counts[group.split][group.label] += len(group.images)
    return SyntheticSite(name, len(groups), counts)


def _empty_folder(out: Path, name: str) -> Path:
    if not _SITE_NAME.fullmatch(name):
        raise UsageError(f"site name {name!r} cannot be a folder", remedy="Use a-z, 0-9, - and _.")
    folder = out / name / "dicom"
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.iterdir(), None) is not None:
        raise UsageError(
            f"site {name}: its image folder is not empty", remedy="Give another folder, or delete this one."
        )
    return folder


def _patients(images: NDArray[np.int64], generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    start = 0
    while start < len(images):
        count = int(generator.integers(1, _MAX_IMAGES_PER_PATIENT + 1))
        yield images[start : start + count]
        start += count


def _choose(
    num: int, limit: int | None, images: Mapping[str, Pixels], generator: np.random.Generator
) -> NDArray[np.int64]:
    order = generator.permutation(num)
    if limit is None:
        return order
    num_all = sum(len(array) for array in images.values())
    return order[: min(num, round(limit * num / num_all))]


def _divide(
    chosen: Mapping[str, NDArray[np.int64]],
    labels: Mapping[str, NDArray[np.int64]],
    num_sites: int,
    alpha: float | None,
    generator: np.random.Generator,
) -> list[dict[str, NDArray[np.int64]]]:
    """Give each site its image indices by split; with `alpha`, label by label in Dirichlet shares."""
    if num_sites == 0 or len(chosen["train"]) < 2 * _MIN_TRAIN_PER_SITE * num_sites:
        raise UsageError(
            f"{len(chosen['train'])} training images are too few for {num_sites} sites",
            remedy=f"Keep at least {2 * _MIN_TRAIN_PER_SITE} training images a site.",
        )
    if alpha is None:
        parts = {split: np.array_split(order, num_sites) for split, order in chosen.items()}
        return [{split: pieces[site] for split, pieces in parts.items()} for site in range(num_sites)]
    for _ in range(100):
        weights = generator.dirichlet([alpha] * num_sites, size=2)
        shares = [
            {split: _dirichlet_share(order, labels[split], weights, site) for split, order in chosen.items()}
            for site in range(num_sites)
        ]
        if min(len(share["train"]) for share in shares) >= _MIN_TRAIN_PER_SITE:
            return shares
    raise UsageError(
        f"alpha = {alpha} leaves a site without training images", remedy="Use a larger alpha or fewer sites."
    )


def _dirichlet_share(
    order: NDArray[np.int64], labels: NDArray[np.int64], weights: NDArray[np.float64], site: int
) -> NDArray[np.int64]:
    pieces = []
    for label in (0, 1):
        members = order[labels[order] == label]
        ends = np.round(np.cumsum(weights[label]) * len(members)).astype(int)[:-1]
        pieces.append(np.split(members, ends)[site])
    return np.concatenate(pieces)


def _read_npz(npz: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]]]:
    images, labels = {}, {}
    try:
        with npz.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for part, split in _NPZ_SPLITS.items():
                images[split] = arrays[f"{part}_images"]
                labels[split] = arrays[f"{part}_labels"].reshape(-1).astype(np.int64)
                _check_arrays(images[split], labels[split], images["train"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{npz.name} does not hold grey images as PneumoniaMNIST does",
            remedy="Give an npz with {train,val,test}_images uint8 (n, rows, columns) and _labels 0 or 1.",
        ) from error
    return images, labels


def _check_arrays(images: Pixels, labels: NDArray[np.int64], first: Pixels) -> None:
    sound = images.ndim == 3 and images.dtype == np.uint8 and images.shape[1:] == first.shape[1:]
    if not sound or len(images) != len(labels) or not np.isin(labels, (0, 1)).all():
        raise ValueError("shapes, types or labels")
