"""From a site's folder to tensors (hop 4): index, join, divide, decode once, transform once, cache.

This is the dataset `dicom_folder` of a plan, and it runs in the worker process. What it returns holds
pixels, labels and pseudonyms, nothing from a header. A file whose pixels cannot be decoded goes to
quarantine and the others go on; random augmentation is the trainer's, not the dataset's.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from fedward_client.case_set import CaseSet, Splits
from fedward_client.cohort import Case, open_cohort
from fedward_client.image_cache import Images, cached_images
from fedward_client.index import Progress, index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.labels import SPLITS
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import read_content
from fedward_common.errors import CohortError
from fedward_common.plan import TrainingPlan
from fedward_common.registry import TRANSFORMS

__all__ = ["CaseSet", "Splits", "open_dicom_folder"]

CACHE_FOLDER = "cache"


def open_dicom_folder(plan: TrainingPlan, site: SiteData, progress: Progress | None = None) -> Splits:
    """Bring the index up to date and return the site's cases as tensors, divided by patient.

    Args:
        plan: decides modalities, classes, division and transforms.
        site: whose folder and labels.
        progress: told how many images are prepared; not called when all of them were cached.

    Raises:
        CohortError: folder, index, labels or cache cannot be used, or no training case is left.
        PlanError: the plan's transform is unknown here, or does not fit.
    """
    from fedward_client.dicom.header import MODALITY_OF_SOP_CLASS

    unsupported = sorted(set(plan.data.modalities) - set(MODALITY_OF_SOP_CLASS.values()))
    if unsupported:
        raise CohortError(
            f"the plan asks for modality {', '.join(unsupported)}; supported here: CR, DX",
            remedy="Change data.modalities in the plan, or update fedward.",
        )
    index_folder(site)
    cohort = open_cohort(site, plan.data, plan.task.labels)
    ordered = [case for split in SPLITS for case in cohort.of(split)]
    contents = [case.content for case in ordered]
    with CaseIndex(site.home) as index:
        prepare = _preparation(plan, site, index, len(contents), progress)
        images, kept = cached_images(site.home / CACHE_FOLDER, _recipe(plan), contents, prepare)
    usable = set(kept)
    return _splits([case for case in ordered if case.content in usable], images)


def _preparation(
    plan: TrainingPlan, site: SiteData, index: CaseIndex, num_images: int, progress: Progress | None
) -> Callable[[str], Images | None]:
    """Return the function that reads, decodes and transforms one image, or quarantines its file."""
    from fedward_client.dicom.decode import decode_image
    from fedward_client.dicom.refusal import UnusableImageError

    preprocess = TRANSFORMS.load(plan.transforms.name).preprocess(plan)
    name_of = index.file_names()
    num_done = 0

    def prepare(content: str) -> Images | None:
        nonlocal num_done
        num_done += 1
        if progress is not None:
            progress(num_done, num_images)
        try:
            image = decode_image(_read_unchanged(site, name_of[content], content))
        except UnusableImageError as error:
            index.quarantine(content, error)
            return None
        prepared: Images = preprocess(image).numpy()
        return prepared

    return prepare


def _read_unchanged(site: SiteData, name: bytes, content: str) -> bytes:
    """Read a file that must still hold what was indexed: labels and split belong to that content."""
    try:
        found = read_content(site.dicom, name)
    except OSError:
        found = None
    if found is None or found.sha256 != content or found.data is None:
        raise CohortError(
            "an image file changed or vanished while it was being prepared",
            remedy="Wait until the transfer into the image folder is finished, then start again.",
        ) from None
    return found.data


def _recipe(plan: TrainingPlan) -> str:
    """Digest of all that decides a prepared image but its file: transform and its code, decoders."""
    from fedward_client.dicom.decode import decoder_versions

    code = inspect.getfile(TRANSFORMS.load(plan.transforms.name).preprocess)
    parts = {
        "transforms": plan.transforms.model_dump(mode="json", exclude={"augmentation"}),
        "code": hashlib.sha256(Path(code).read_bytes()).hexdigest(),
        "decoders": decoder_versions(),
        "versions": [metadata.version(name) for name in ("fedward", "monai", "torch")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _splits(cases: list[Case], images: Images) -> Splits:
    """Cut the rows, which lie in the order train, validation, test, without copying them."""
    import torch

    pixels = torch.from_numpy(images)
    sets: dict[str, CaseSet] = {}
    start = 0
    for split in SPLITS:
        members = [case for case in cases if case.split == split]
        sets[split] = CaseSet(
            images=pixels[start : start + len(members)],
            labels=torch.tensor([case.label for case in members], dtype=torch.int64),
            case_ids=tuple(case.case_id for case in members),
        )
        start += len(members)
    if not len(sets["train"]):
        raise CohortError(
            "no training case is left after division by patient",
            remedy="Add images, or lower data.validation_fraction and data.test_fraction.",
        )
    return Splits(**sets)
