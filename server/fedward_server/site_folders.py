"""Folders of images for sites on this machine: given ones, real radiographs, or phantoms drawn on the spot.

Used by the demo and the simulation. The writers of DICOM files belong to the client's package and are
found by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedward_common.errors import UsageError
from fedward_common.files import write_atomically

_DONE = "written.json"
_COHORT = "cohort.toml"
_NAME = r"[a-z0-9][a-z0-9_.-]{0,62}"  # as in a plan or a certificate


@dataclass(frozen=True)
class SiteFolders:
    """Where each site's `dicom/` and `labels.csv` are, and one phrase that says what the images are."""

    kind: str
    folders: dict[str, Path]


def default_radiographs() -> Path | None:
    """The real chest radiographs of the shared data folder (or of FEDWARD_DATA), when they are there."""
    data = Path(os.environ.get("FEDWARD_DATA", Path("..") / "shared" / "data"))
    found = data / "pneumoniamnist" / "pneumoniamnist.npz"
    return found if found.is_file() else None


def site_names(num_sites: int) -> list[str]:
    """site-1, site-2, ..."""
    return [f"site-{number}" for number in range(1, num_sites + 1)]


def prepare_folders(
    data: Path | None, out: Path, names: Sequence[str], *, limit: int | None = None, seed: int = 0
) -> SiteFolders:
    """Find or make a folder of images for each site.

    Args:
        data: an `.npz` in MedMNIST's form, a folder with one folder a site, or None for the real
            radiographs if they are at hand and phantoms if not.
        out: where files are written; files written there before by the same call are used again.
        names: sites to have images for; a given folder's own names win.
        limit: at most this many images in all.
        seed: decides the division among sites.

    Raises:
        UsageError: `data` is neither, or has too few sites.
    """
    if data is not None and data.is_dir():
        return _given(data, out, len(names))
    if data is not None and not data.is_file():
        raise UsageError(f"{data} does not exist", remedy="Give an .npz file or a folder with --data.")
    source = data or default_radiographs()
    wanted = {
        "source": "phantoms" if source is None else f"{source.resolve()}:{source.stat().st_size}",
        "names": list(names),
        "limit": limit,
        "seed": seed,
    }
    folders = {name: out / name for name in names}
    done = out / _DONE
    if (kind := _written_before(done, wanted)) is not None:
        return SiteFolders(kind, folders)
    synthetic = import_module("fedward_client.dicom.synthetic")
    if source is None:
        written = synthetic.write_phantom_sites(out, names, seed=seed)
    else:
        written = synthetic.write_npz_sites(source, out, names, seed=seed, limit=limit)
    write_atomically(done, json.dumps({"wanted": wanted, "kind": written.kind}).encode(), 0o644)
    return SiteFolders(written.kind, folders)


def _written_before(done: Path, wanted: dict[str, Any]) -> str | None:
    """What an earlier call wrote, if it was just this; a note that cannot be read is not believed."""
    try:
        note = json.loads(done.read_bytes())
        return str(note["kind"]) if note["wanted"] == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _given(data: Path, out: Path, num_sites: int) -> SiteFolders:
    found = sorted(path for path in data.iterdir() if (path / "dicom").is_dir())
    if len(found) < num_sites:
        raise UsageError(
            f"{data} has {len(found)} folders with a dicom/ inside, {num_sites} sites were asked for",
            remedy="Give fewer --sites, or a folder with SITE/dicom/ and SITE/labels.csv for each site.",
        )
    chosen = {path.name: path for path in found[:num_sites]}
    for name in chosen:
        if re.fullmatch(_NAME, name) is None:
            raise UsageError(
                f"{data / name}: the folder's name cannot be a site's",
                remedy="Rename it: lower-case letters, digits, - _ and . after a letter or digit.",
            )
    folders = {name: _linked(path, out / name) for name, path in chosen.items()}
    return SiteFolders("images from the given folder", folders)


def _linked(given: Path, folder: Path) -> Path:
    """Make a folder that shows the given images; what the site itself writes stays out of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dicom", "labels.csv"):
        _link(folder / name, given / name)
    (folder / "home").mkdir(mode=0o700, exist_ok=True)
    _link(folder / "home" / _COHORT, given / _COHORT)
    return folder


def _link(link: Path, target: Path) -> None:
    if link.exists() and not link.is_symlink():
        raise UsageError(
            f"{link.parent} holds images of an earlier simulation", remedy="Give another folder with --out."
        )
    link.unlink(missing_ok=True)
    if target.name != _COHORT or target.is_file():  # without one, radiographs with labels from the CSV file
        link.symlink_to(target.resolve())
