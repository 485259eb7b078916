"""What the site's images amount to before labels come in: pictures or volumes, and what is left out (hop 3).

In this order: the cohort file's criteria, the site's gate, and for volumes the geometry of each series. A
criterion leaves an image aside; the gate and the geometry put it in quarantine by name of the reason. All
of it is judged anew whenever the cohort is opened, from what the index remembers of the headers: a change
of policy needs no file to be read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedward_client.cohort_file import CohortFile
from fedward_client.cohort_grouping import CohortUnit, Judged, Refused, pictures, volumes
from fedward_client.dicom.refusal import Reason
from fedward_client.index import UNJUDGED, gate_verdicts
from fedward_client.index_records import IndexedImage, QuarantinedContent, Rule
from fedward_client.index_store import CaseIndex


@dataclass(frozen=True)
class Selected:
    """What the criteria, the gate and the geometry made of the index.

    Args:
        units: what may become cases, in the order of their content.
        others: usable images that the cohort does not want; their label rows are no mistake.
        refused: images that nothing wants while they are as they are.
        left_out: contents of which some or all frames are left out of volumes that are used.
        quarantined: everything that is refused, in the order of its content; `refused` among it.
        unmet: criterion -> images that do not meet it.
    """

    units: tuple[CohortUnit, ...]
    others: tuple[IndexedImage, ...]
    refused: tuple[IndexedImage, ...]
    left_out: tuple[QuarantinedContent, ...]
    quarantined: tuple[QuarantinedContent, ...]
    unmet: Mapping[str, int]


def select_units(index: CaseIndex, file: CohortFile, asked: tuple[str, ...]) -> Selected:
    """Find what may become a case.

    Args:
        index: as `index_folder` left it.
        file: the site's declaration.
        asked: modalities that the plan asks for.
    """
    modalities = file.wanted_modalities(asked)
    rule = file.rule(modalities)
    verdicts = gate_verdicts(index, file.gate)
    wanted: list[Judged] = []
    others: list[IndexedImage] = []
    refused: Refused = {}
    unmet: Counter[str] = Counter()
    for image in index.images(rule):
        criterion = file.unmet(image) if image.modality in modalities else "modality"
        if criterion is not None:
            unmet[criterion] += 1
            others.append(image)
            continue
        verdict = UNJUDGED if image.signs_id is None else verdicts.get(image.signs_id, UNJUDGED)
        if verdict.decision == "quarantine":
            refused[image.content] = (image, verdict.reason or Reason.UNREADABLE_SIGNS, verdict.kind)
        else:
            wanted.append((image, verdict))
    if file.unit == "image":
        found = pictures(wanted)
    else:
        damaged = index.images(rule, refused=True)
        lacking = [*damaged, *(image for image, _, _ in refused.values())]
        found = volumes(index, wanted, lacking, index.arriving())
    refused |= found.refused
    entries = {each.content: each for each in _known_refusals(index, file, rule, modalities)}
    num_files = index.num_files_of(refused | found.left_out)
    entries |= {
        content: _entry(image, reason, kind, num_files.get(content, 1))
        for content, (image, reason, kind) in refused.items()
    }
    return Selected(
        units=tuple(sorted(found.units, key=lambda unit: unit.content)),
        others=tuple(others),
        refused=tuple(image for image, _, _ in refused.values()),
        left_out=tuple(
            _entry(image, reason, kind, num_files.get(content, 1))
            for content, (image, reason, kind) in sorted(found.left_out.items())
        ),
        quarantined=tuple(entries[content] for content in sorted(entries)),
        unmet=dict(unmet),
    )


def _known_refusals(
    index: CaseIndex, file: CohortFile, rule: Rule, modalities: Sequence[str]
) -> Iterable[QuarantinedContent]:
    """Refusals of the index; of wanted modalities alone where the site declares them.

    Objects that hold labels are no images, and are not looked at as such.
    """
    labels: tuple[str, ...] = ()
    if file.labels.source != "csv":
        from fedward_client.dicom.label_objects import SOP_CLASSES_OF

        labels = tuple(SOP_CLASSES_OF[file.labels.source])
    return index.quarantined(rule, None if file.modalities is None else modalities, labels)


def _entry(image: IndexedImage, reason: Reason, kind: str, num_files: int) -> QuarantinedContent:
    return QuarantinedContent(image.content, reason, kind, num_files, image.sop_instance, image.study)
