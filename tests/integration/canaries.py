"""Canaries: values that exist nowhere but in one site's files, and a search that finds them in any bytes.

A text canary starts with its site's mark (eight letters) or, where DICOM permits digits only, with its
site's number, followed by the tag of the element that holds it: a finding says where it came from. The
search knows the spellings that a leak takes by accident (another encoding, base64 inside some document,
hexadecimal, a plain hash, pixels as stored or as the tensor that is trained on) and looks for all of them
in one pass.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import config, dcmread, dcmwrite
from pydicom._dicom_dict import DicomDictionary, RepeatersDictionary
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID, JPEG2000Lossless

from fedward_client.dicom.display import DISPLAY_KEYWORDS
from fedward_client.dicom.header import HEADER_KEYWORDS

WORD = 8
"""Bytes that a needle has at least: shorter ones turn up in random bytes by chance."""

_MIN_DISTINCT = 5
_LENGTHS = {"AE": 16, "CS": 16, "SH": 16, "LO": 64, "PN": 64, "ST": 1024, "LT": 4096}
_LONG = ("UC", "UR", "UT")
_PIXEL_GROUP = 0x7FE0
# What an image needs in order to be one; identifiers among them get canaries of their own, file by file.
SIGNS_OF_TEXT = {
    *("RecognizableVisualFeatures", "ConversionType", "SecondaryCaptureDeviceID"),
    *("DateOfSecondaryCapture", "TimeOfSecondaryCapture"),
    *("SecondaryCaptureDeviceManufacturer", "SecondaryCaptureDeviceManufacturerModelName"),
    *("SecondaryCaptureDeviceSoftwareVersions", "HardcopyDeviceSoftwareVersion", "HardcopyCreationDeviceID"),
    *("HardcopyDeviceManufacturer", "HardcopyDeviceManufacturerModelName"),
}
"""With any value in these the gate keeps the image out, and nothing of it could leak."""

SHOWN_TO_OPERATOR = ("00080070", "00081090", "00180015", "00185101")
"""Manufacturer, ManufacturerModelName, BodyPartExamined, ViewPosition: `cohort show` counts by them."""

KEPT = {
    *(*HEADER_KEYWORDS, *DISPLAY_KEYWORDS, *SIGNS_OF_TEXT),
    *("PatientName", "SpecificCharacterSet", "LossyImageCompression"),
}


@dataclass(frozen=True)
class Finding:
    """One needle found: what it is and how it was spelt."""

    name: str
    spelling: str


class Haystack:
    """Looks for thousands of needles at once: every eight bytes of the data against a table."""

    def __init__(self) -> None:
        self._needles: dict[int, list[tuple[bytes, Finding]]] = {}
        self._keys: NDArray[np.uint64] | None = None
        self._low = np.zeros(2**24, dtype=bool)

    def add_text(self, name: str, text: str) -> None:
        """Look for a text however it is spelt."""
        for spelling, needle in spellings(text).items():
            self.add(Finding(name, spelling), needle)

    def add_digests(self, name: str, text: str) -> None:
        """Look for plain hashes of a text: of a patient's number they are as good as the number."""
        for algorithm in ("md5", "sha1", "sha256"):
            digest = hashlib.new(algorithm, text.encode()).digest()
            self.add_binary(f"{algorithm} of {name}", digest)

    def add_binary(self, name: str, data: bytes) -> None:
        """Look for bytes as they are, in hexadecimal, and in base64."""
        self.add(Finding(name, "bytes"), data)
        self.add(Finding(name, "hex"), data.hex().encode())
        self.add(Finding(name, "HEX"), data.hex().upper().encode())
        self.add(Finding(name, "base64"), base64.b64encode(data).rstrip(b"="))
        self.add(Finding(name, "base64url"), base64.urlsafe_b64encode(data).rstrip(b"="))

    def add_ngrams(self, name: str, data: bytes, step: int) -> None:
        """Look for any eight bytes of `data`, taken every `step` bytes; dull ones (mostly one value) not."""
        for start in range(0, len(data) - WORD + 1, step):
            piece = data[start : start + WORD]
            if len(set(piece)) >= _MIN_DISTINCT:
                self.add(Finding(name, "eight bytes"), piece)

    def add(self, finding: Finding, needle: bytes) -> None:
        """Look for exactly these bytes."""
        if len(needle) < WORD:
            raise ValueError(f"{finding}: a needle of {len(needle)} bytes is found by chance")
        key = int.from_bytes(needle[:WORD], "little")
        self._needles.setdefault(key, []).append((needle, finding))
        self._low[key & 0xFFFFFF] = True
        self._keys = None

    def find(self, data: bytes) -> set[Finding]:
        """Every needle in the data."""
        if not self._needles:
            raise ValueError("nothing to look for")
        if self._keys is None:
            self._keys = np.array(sorted(self._needles), dtype=np.uint64)
        found = set()
        for shift in range(min(WORD, max(0, len(data) - WORD + 1))):
            words = np.frombuffer(data, dtype="<u8", count=(len(data) - shift) // WORD, offset=shift)
            candidates = np.flatnonzero(self._low[words & 0xFFFFFF])
            places = np.searchsorted(self._keys, words[candidates]) % len(self._keys)
            for place in candidates[self._keys[places] == words[candidates]]:
                start = shift + WORD * int(place)
                for needle, finding in self._needles[int(words[place])]:
                    if data.startswith(needle, start) and not _inside_a_number(needle, data, start):
                        found.add(finding)
        return found


def spellings(text: str) -> dict[str, bytes]:
    """How a text can appear in bytes: name of the spelling -> the bytes."""
    plain = text.encode()
    found = {
        "utf-8": plain,
        "reversed": plain[::-1],
        "utf-16-le": text.encode("utf-16-le"),
        "utf-16-be": text.encode("utf-16-be"),
        "hex": plain.hex().encode(),
        "HEX": plain.hex().upper().encode(),
    }
    if text.lower() != text:
        found["lower case"] = text.lower().encode()
    for before in range(3):
        found[f"base64 after {before}"] = _base64_inside(plain, before)
    return found


def _base64_inside(text: bytes, before: int) -> bytes:
    """The characters of a base64 document that depend on `text` alone, `before` bytes into a triple."""
    encoded = base64.b64encode(bytes(before) + text + bytes(2))
    return encoded[-(-before * 8 // 6) : (before + len(text)) * 8 // 6]


def _inside_a_number(needle: bytes, data: bytes, start: int) -> bool:
    """Whether a needle of digits is a piece of a longer number: some digits of a metric, by chance."""
    if not needle.isdigit():
        return False
    around = data[start - 1 : start] if start else b"", data[start + len(needle) : start + len(needle) + 1]
    return any(each.isdigit() for each in around)


@dataclass(frozen=True)
class Mark:
    """What makes a site's canaries its own."""

    site: str

    @property
    def text(self) -> str:
        return f"QXZKNRY{chr(ord('A') + self._number)}"

    @property
    def uid(self) -> str:
        return f"2.25.7391504628409517362{self._number}"

    @property
    def integer(self) -> str:
        return f"173915046{self._number}"

    @property
    def decimal(self) -> str:
        return f"73915046.2840{self._number}"

    @property
    def date(self) -> str:
        return f"1897061{self._number}"

    @property
    def time(self) -> str:
        return f"235947.73915{self._number}"

    @property
    def _number(self) -> int:
        return int(self.site.rpartition("-")[2])

    def texts(self) -> dict[str, str]:
        """Name -> text that every canary of this site contains, by kind."""
        kinds = ("text", "uid", "integer", "decimal", "date", "time")
        return {f"{self.site} {kind}": getattr(self, kind) for kind in kinds}


def canary_value(mark: Mark, vr: str, tag: int) -> str | None:
    """A value for an element of this VR that contains the mark; None for VRs that hold no text.

    An age (AS) has four characters: too few to be told from chance.
    """
    if vr in _LENGTHS:
        return f"{mark.text}{tag:08X}"[: _LENGTHS[vr]]
    if vr in _LONG:
        return f"https://{mark.text}{tag:08X}.example/x" if vr == "UR" else f"{mark.text}{tag:08X}" * 3
    numeric = {
        "UI": f"{mark.uid}.{tag}",
        "IS": mark.integer,
        "DS": mark.decimal,
        "DA": mark.date,
        "TM": mark.time,
        "DT": f"{mark.date}{mark.time}",
    }
    return numeric.get(vr)


def canary_dataset(mark: Mark) -> Dataset:
    """Every element of the DICOM dictionary that holds text, each with a canary; sequences, private tags.

    Left out: what the image needs to be one (`KEPT`), and groups that belong to messages and
    directories. Each sequence of the dictionary has an item with a name and a text of its own.
    """
    dataset = Dataset()
    for tag, (vr, *_, keyword) in _dictionary():
        value = canary_value(mark, vr, tag)
        if keyword in KEPT:
            continue
        if vr == "SQ":
            item = Dataset()
            item.add_new(0x00100010, "PN", f"{mark.text}^{tag:08X}")
            item.add_new(0x00204000, "LT", f"{mark.text}{tag:08X} nested")
            dataset.add_new(tag, "SQ", [item])
        elif value is not None:
            dataset.add_new(tag, vr, value)
    for group in (0x0009, 0x0019, 0x7FE1):
        block = dataset.private_block(group, f"{mark.text} PRIVATE", create=True)
        block.add_new(0x01, "LO", f"{mark.text} private long")
        block.add_new(0x02, "UN", f"{mark.text} private unknown".encode())
        block.add_new(0x03, "OB", f"{mark.text} private bytes!".encode())
    return dataset


def _dictionary() -> Iterator[tuple[int, tuple[str, str, str, str, str]]]:
    for tag, entry in DicomDictionary.items():
        if 0x0008 <= tag >> 16 < _PIXEL_GROUP and tag & 0xFFFF:
            yield tag, entry
    for pattern, entry in RepeatersDictionary.items():  # overlays, curves: 60xx, 50xx
        if pattern.startswith(("50xx", "60xx")):
            yield int(pattern.replace("x", "0"), 16), entry


@dataclass
class Planted:
    """One site's canaries as planted.

    Attributes:
        patients: PatientIDs; instances: SOPInstanceUIDs of all files.
        pixels: stored pixels of every image.
        contents: SHA-256 (hex) of every file.
        dicom: the image folder; labels: the label file.
    """

    mark: Mark
    dicom: Path
    labels: Path
    patients: list[str] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    pixels: list[bytes] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)


def plant(folder: Path, site: str) -> Planted:
    """Turn a site's phantoms (`folder`/dicom, labels.csv) into files full of canaries.

    Images, labels and the division stay what they were; folders, file names and the label file's name
    carry the mark as well. Three damaged files are added, one of which has a row.
    """
    mark = Mark(site)
    planted = Planted(mark, folder / f"{mark.text}-archive", folder / f"{mark.text}-labels.csv")
    with (folder / "labels.csv").open(newline="") as file:
        rows = {row["SOPInstanceUID"]: row for row in csv.DictReader(file)}
    everything = canary_dataset(mark)
    everyday = Dataset(
        {tag: each for tag, each in everything.items() if tag.group in (0x0008, 0x0009, 0x0010)}
    )
    with planted.labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["SOPInstanceUID", "label", "split", "remark"])
        for number, path in enumerate(sorted((folder / "dicom").iterdir())):
            image = dcmread(path)
            row = rows[image.SOPInstanceUID]
            # Five thousand elements take their time to write: not in every file.
            elements = everyday if number % 8 else everything
            _write(_marked(image, elements, mark, number), planted, number)
            remark = f"{mark.text} remark {number}"
            writer.writerow([planted.instances[-1], row["label"], row["split"], remark])
            path.unlink()
        writer.writerow([_plant_damaged(planted), "0", "train", mark.text])
    (folder / "labels.csv").unlink()
    return planted


def _marked(image: FileDataset, elements: Dataset, mark: Mark, number: int) -> FileDataset:
    """One image with canaries added, and with identifiers of its own."""
    patient = image.PatientID
    image.update(elements)
    image.PatientID = f"{mark.text}-{patient}"
    image.PatientName = f"{mark.text}^{patient}"
    image.StudyDate = mark.date
    image.SOPInstanceUID = UID(f"{mark.uid}.3.{number + 1}")
    for level, keyword in enumerate(("StudyInstanceUID", "SeriesInstanceUID"), start=1):
        own = int(hashlib.sha256(image[keyword].value.encode()).hexdigest()[:8], 16)
        setattr(image, keyword, UID(f"{mark.uid}.{level}.{own + 1}"))
    meta = image.file_meta
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    meta.ImplementationVersionName = mark.text
    for keyword in ("SourceApplicationEntityTitle", "SendingApplicationEntityTitle"):
        setattr(meta, keyword, f"{mark.text}-AET")
    meta.PrivateInformationCreatorUID = UID(f"{mark.uid}.9")
    meta.PrivateInformation = f"{mark.text} private information.".encode()
    image.preamble = f"{mark.text} preamble ".encode().ljust(128, b"=")
    return image


def _write(image: FileDataset, planted: Planted, number: int) -> None:
    folder = planted.dicom / image.PatientID.replace("-", "^") / f"{planted.mark.text} study"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{planted.mark.text} {number:04d}.dcm"
    with config.disable_value_validation():
        dcmwrite(path, image, enforce_file_format=True)
    planted.instances.append(str(image.SOPInstanceUID))
    planted.contents.append(hashlib.sha256(path.read_bytes()).hexdigest())
    if image.PatientID not in planted.patients:
        planted.patients.append(image.PatientID)
    planted.pixels.append(bytes(image.PixelData))


def _plant_damaged(planted: Planted) -> str:
    """Files that make parsers and decoders complain about canaries; return the labelled one's UID."""
    whole = next(planted.dicom.rglob("*.dcm"))
    data = whole.read_bytes()
    mark = planted.mark
    (planted.dicom / f"{mark.text} cut.dcm").write_bytes(data[: len(data) // 2])
    date = mark.date.encode()
    (planted.dicom / f"{mark.text} mangled.dcm").write_bytes(
        data.replace(b"DA\x08\x00" + date, b"DA\xff\xff" + date)
    )
    image = dcmread(whole)
    image.SOPInstanceUID = UID(f"{mark.uid}.3.999999")
    image.PatientID = f"{mark.text}-DAMAGED"
    # A header without fault, pixels that the decoder fails on: found out in the training process.
    image.Rows = image.Columns = 64
    image.BitsStored, image.HighBit = 16, 15
    image.PixelData = np.arange(64 * 64, dtype=np.uint16).tobytes()
    image.compress(JPEG2000Lossless, generate_instance_uid=False)
    stream = bytearray(image.PixelData)
    stream[len(stream) // 2 :] = mark.text.encode() * (len(stream) // 16)
    image.PixelData = bytes(stream) + bytes(len(stream) % 2)
    with config.disable_value_validation():
        dcmwrite(planted.dicom / f"{mark.text} codestream.dcm", image, enforce_file_format=True)
    return str(image.SOPInstanceUID)


def a_haystack(sites: Iterable[Planted], *, tensors: Iterable[bytes] = (), pseudonyms: bool) -> Haystack:
    """A search for all canaries of these sites.

    Args:
        sites: what was planted.
        tensors: float32 images as the sites train on them.
        pseudonyms: also look for content digests, which are the site's own names for its images.
    """
    haystack = Haystack()
    for site in sites:
        for name, text in site.mark.texts().items():
            haystack.add_text(name, text)
        for patient in site.patients:
            haystack.add_digests("PatientID", patient)
        for instance in site.instances:
            haystack.add_digests("SOPInstanceUID", instance)
        for pixels in site.pixels:
            haystack.add_ngrams("stored pixels", pixels, 1)
        if pseudonyms:
            for content in site.contents:
                haystack.add_text("content digest", content)
                haystack.add_binary("content digest", bytes.fromhex(content))
    for tensor in tensors:
        haystack.add_ngrams("tensor", tensor, 4)
    return haystack
