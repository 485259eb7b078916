"""From a site's folder to tensors (hop 4): index, join, divide, decode once, transform once, cache.

This is the dataset `dicom_folder` of a plan, and it runs in the worker process. What it returns holds
pixels, labels and pseudonyms, nothing from a header. A file whose pixels cannot be decoded goes to
quarantine and the others go on; random augmentation is the trainer's, not the dataset's.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from fedward_client.array_cache import StoredArrays, open_arrays
from fedward_client.array_shard import Kind
from fedward_client.case_set import CaseSet, Splits, StoredImages
from fedward_client.cohort import Case, open_cohort
from fedward_client.cohort_file import CohortFile, read_cohort_file
from fedward_client.index import Progress, index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.labels import SPLITS
from fedward_client.pseudonyms import CaseId
from fedward_client.purging import CACHE_FOLDER
from fedward_client.readiness_told import cases_to_train
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import TrainingPlan
from fedward_common.registry import TRANSFORMS

__all__ = ["CaseSet", "Splits", "open_dicom_folder"]

_MEMORY_SHARE = 8
"""A cohort that takes at most this part of the memory that is available is held there."""


def open_dicom_folder(plan: TrainingPlan, site: SiteData, progress: Progress | None = None) -> Splits:
    """Bring the index up to date and return the site's cases as tensors, divided by patient.

    Args:
        plan: decides modalities, classes, division and transforms.
        site: whose folder and labels; HOME/cohort.toml says what one case is.
        progress: told how many images are prepared; not called when all of them were cached.

    Raises:
        CohortError: folder, index, labels or cache cannot be used, no training case is left, or the plan
            takes images where a case of the site is a volume, or the other way round.
        TooCloseError: its numbers could be subtracted from those of a survey about slightly other cases.
        PlanError: the plan's transform is unknown here, or its size does not fit it.
        UsageError: HOME/cohort.toml is not sound.
    """
    import torch

    from fedward_client.compute import threads
    from fedward_client.dicom.refusal import Reason
    from fedward_client.preparation import Files, Preparation, row_of

    file = read_cohort_file(site.home)
    check_dimensions(plan, file)
    as_radiographs = _as_radiographs(plan, file)
    recipe = _recipe(plan, as_radiographs=as_radiographs)
    with CaseIndex(site.home) as index:
        index.forget_other_plans(recipe)
    index_folder(site)
    cohort = open_cohort(site, plan.data, plan.task.labels)
    ordered = [case for split in SPLITS for case in cohort.of(split)]
    processors = torch.get_num_threads()
    # Several images are prepared at a time: threads within one would only wait for each other.
    with CaseIndex(site.home) as index, threads(1):
        names = index.file_names()
        prepare = Preparation(
            plan,
            Files(site, names, index.quarantine),
            ordered,
            as_radiographs=as_radiographs,
            processors=processors,
            progress=progress,
        )
        kind: Kind = "int16" if file.unit == "volume" else "float32"
        arrays = open_arrays(
            site.home / CACHE_FOLDER,
            recipe,
            [row_of(case) for case in ordered],
            prepare,
            kind=kind,
            max_bytes=int(file.cache_gb * 1e9),
            present=names.keys(),
        )
        usable = {row.key for row in arrays.rows}
        undecoded = [case.parts[0][0] for case in ordered if row_of(case).key not in usable]
        num_quarantined = cohort.num_rejected(index.refused(dict.fromkeys(undecoded, Reason.DECODE_FAILED)))
    found = [case for case in ordered if row_of(case).key in usable]
    told = cases_to_train(plan.data, site, found)
    splits = _splits(found, arrays, {case.case_id for case in told})
    return replace(splits, num_quarantined=num_quarantined, num_left_out=len(found) - len(told))


def check_dimensions(plan: TrainingPlan, file: CohortFile) -> None:
    """Raise CohortError where the plan takes images and a case of the site is a volume, or vice versa."""
    expected = 3 if file.unit == "volume" else 2
    found = len(plan.transforms.size)
    if found != expected:
        raise CohortError(
            f"the plan's transforms.size has {found} numbers, and a case of this site is one {file.unit}",
            remedy=f"Take a plan with {expected} numbers, or set `unit` in HOME/cohort.toml.",
        )


def _as_radiographs(plan: TrainingPlan, file: CohortFile) -> bool:
    """Radiographs for presentation, shown as their files say, have a decoder of their own."""
    radiographs = file.rule(file.wanted_modalities(plan.data.modalities)) == "radiograph"
    return radiographs and plan.transforms.window == "file"


def _recipe(plan: TrainingPlan, *, as_radiographs: bool) -> str:
    """Digest of all that decides a prepared image but its case: transform and its code, decoders."""
    from fedward_client.dicom.decode import decoder_versions
    from fedward_client.dicom.volume import VOLUME_VERSION
    from fedward_client.dicom.volume_grid import GRID_VERSION
    from fedward_client.preparation import PREPARATION_VERSION

    code = inspect.getfile(TRANSFORMS.load(plan.transforms.name).preprocess)
    parts = {
        "transforms": plan.transforms.model_dump(mode="json", exclude={"augmentation"}),
        "code": hashlib.sha256(Path(code).read_bytes()).hexdigest(),
        "as_radiographs": as_radiographs,
        "preparation": [PREPARATION_VERSION, VOLUME_VERSION, GRID_VERSION],
        "decoders": decoder_versions(),
        "versions": [metadata.version(name) for name in ("fedward", "torch")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _splits(cases: Sequence[Case], arrays: StoredArrays, told: Collection[CaseId]) -> Splits:
    """Divide the rows, which lie in the order of the cases, and leave out those that are not told of."""
    import torch

    in_memory = arrays.num_bytes * _MEMORY_SHARE <= _available_bytes()
    sets: dict[str, CaseSet] = {}
    for split in SPLITS:
        numbers = [
            number for number, case in enumerate(cases) if case.split == split and case.case_id in told
        ]
        images = torch.from_numpy(arrays.take(numbers)) if in_memory else StoredImages(arrays, numbers)
        sets[split] = CaseSet(
            images=images,
            labels=torch.tensor([cases[number].label for number in numbers], dtype=torch.int64),
            case_ids=tuple(cases[number].case_id for number in numbers),
        )
    if not len(sets["train"]):
        raise CohortError(
            "no training case is left after division by patient",
            remedy="Add images, or lower data.validation_fraction and data.test_fraction.",
        )
    return Splits(train=sets["train"], validation=sets["validation"], test=sets["test"])


def _available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say, so that nothing is held."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 0
    try:  # a container's limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return available
    return min(available, limit - used)
