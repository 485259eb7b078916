"""The contact sheet: what it shows, what it hides, and how it looks in a browser."""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UltrasoundImageStorage

from fedward_client import cli
from fedward_client.cohort import Cohort, open_cohort
from fedward_client.contact_sheet import (
    ContactSheet,
    Picture,
    Tile,
    make_contact_sheet,
    render_contact_sheet,
    write_contact_sheet,
)
from fedward_client.index import index_folder
from fedward_client.purging import purge
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from tests.builders import a_dataset, a_dicom, a_disk_of, a_uid, encode, write_labels
from tests.label_builders import a_volume, written

HOSTILE = '<script>alert(1)</script>"&amp;'


def an_empty_site(folder: Path) -> SiteData:
    """A site without images that has settings."""
    found = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    found.home.mkdir()
    found.dicom.mkdir()
    settings = f'name = "north"\nserver = "localhost:1"\ndicom = "{found.dicom}"\nlabels = "{found.labels}"\n'
    (found.home / "site.toml").write_text(settings)
    return found


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    return an_empty_site(tmp_path)


@pytest.fixture(scope="module")
def mixed_site(tmp_path_factory: pytest.TempPathFactory) -> SiteData:
    """Four radiographs and one ultrasound image; only read."""
    found = an_empty_site(tmp_path_factory.mktemp("mixed"))
    mixed(found)
    return found


@pytest.fixture(scope="module")
def sheet(mixed_site: SiteData) -> ContactSheet:
    return make_contact_sheet(mixed_site)


def put(site: SiteData, rows: list[list[object]], label: object, name: str, data: bytes) -> None:
    (site.dicom / f"{len(rows)}.dcm").write_bytes(data)
    rows.append([a_uid(name), label])


def a_radiograph(name: str, pixels: NDArray[Any], **elements: Any) -> bytes:
    return a_dicom(pixels, SOPInstanceUID=a_uid(name), PatientID=f"CNRYP{name}", **elements)


def an_ultrasound(name: str, text: str = "CNRY MUELLER 1957") -> bytes:
    """Speckle inside a region, a name above it, burned into the picture."""
    random = np.random.default_rng(4)
    picture = Image.new("L", (320, 240))
    ImageDraw.Draw(picture).text((20, 8), text, fill=255)
    pixels = np.array(picture)
    pixels[40:220, 30:290] = random.integers(20, 200, (180, 260))
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 30, 40
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 289, 219
    dataset = a_dataset(pixels, SOPInstanceUID=a_uid(name), PatientID=f"CNRYP{name}", Modality="US")
    dataset.SOPClassUID = UltrasoundImageStorage
    dataset.SequenceOfUltrasoundRegions = [region]
    dataset.BurnedInAnnotation = "NO"
    return encode(dataset)


def declare(site: SiteData, text: str) -> None:
    (site.home / "cohort.toml").write_text(text)


def mixed(site: SiteData, num_radiographs: int = 4) -> None:
    """Radiographs and one ultrasound image; labelled by turns."""
    rows: list[list[object]] = []
    random = np.random.default_rng(1)
    for number in range(num_radiographs):
        pixels = random.integers(0, 4096, (60, 40), dtype=np.uint16)
        put(
            site,
            rows,
            number % 2,
            f"cr{number}",
            a_radiograph(f"cr{number}", pixels, BitsStored=12, HighBit=11),
        )
    put(site, rows, 1, "us", an_ultrasound("us"))
    write_labels(site.labels, rows)
    declare(site, 'modalities = ["CR", "US"]\n')
    index_folder(site)


def pixels_of(picture: Picture) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(picture.png)))


def test_every_case_is_shown_with_what_the_cohort_knows_of_it(
    mixed_site: SiteData, sheet: ContactSheet
) -> None:
    cases = {str(case.case_id): case for case in open_cohort(mixed_site).cases}

    assert sheet.num_cases == len(sheet.tiles) == len(cases) == 5
    for tile in sheet.tiles:
        case = cases[tile.case_id]
        assert (tile.label, tile.split, tile.modality) == (str(case.label), case.split, case.modality)
        assert tile.decision == ("mask" if tile.modality == "US" else "train")
        assert len(tile.pictures) == 1
    assert [tile.decision for tile in sheet.tiles] == ["mask"] + ["train"] * 4


def test_picture_is_what_the_header_shows_and_what_the_gate_keeps(site: SiteData) -> None:
    mixed(site, 1)

    masked, plain = make_contact_sheet(site).tiles

    shown = pixels_of(masked.pictures[0])
    assert shown.shape == (240, 320)
    assert shown[:40].max() == shown[220:].max() == shown[:, :30].max() == shown[:, 290:].max() == 0
    assert shown[40:220, 30:290].std() > 20
    stored = np.random.default_rng(1).integers(0, 4096, (60, 40), dtype=np.uint16)
    low, high = np.percentile(stored, [0.5, 99.5])
    expected = np.rint(np.clip((stored.astype(np.float32) - low) / (high - low), 0, 1) * 255)
    assert np.abs(pixels_of(plain.pictures[0]).astype(int) - expected).max() <= 1


def test_window_and_inversion_of_the_file_are_followed(site: SiteData) -> None:
    rows: list[list[object]] = []
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 16, (64, 1))
    common: dict[str, Any] = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 1024}
    put(site, rows, 0, "plain", a_radiograph("plain", ramp, **common))
    inverse = a_radiograph("inverse", ramp, PhotometricInterpretation="MONOCHROME1", **common)
    put(site, rows, 1, "inverse", inverse)
    write_labels(site.labels, rows)
    index_folder(site)

    plain, inverse_tile = (pixels_of(tile.pictures[0])[0] for tile in make_contact_sheet(site).tiles)

    assert (plain[:95] == 0).all()
    assert (plain[161:] == 255).all()
    assert np.abs(plain.astype(int) + inverse_tile - 255).max() <= 1


def test_volume_shows_slices_from_its_middle_in_the_patients_proportions(site: SiteData) -> None:
    slices = a_volume(8, 30, 40, spacing=(2.0, 1.0))
    for index, each in enumerate(slices):
        values = np.full((30, 40), 100 * index, np.int16)
        values[:, :20] = -1000
        each.PixelData = values.tobytes()
        (site.dicom / f"{index}.dcm").write_bytes(written(each))
    write_labels(site.labels, [[slices[0].SeriesInstanceUID, 1]], ("SeriesInstanceUID", "label"))
    declare(site, 'unit = "volume"\nmodalities = ["CT"]\n')
    index_folder(site)

    (tile,) = make_contact_sheet(site).tiles

    assert [picture.place for picture in tile.pictures] == ["slice 3 of 8", "slice 5 of 8", "slice 7 of 8"]
    assert {pixels_of(picture).shape for picture in tile.pictures} == {(40, 27)}
    assert all(pixels_of(picture)[20, 2] == 0 < pixels_of(picture)[20, 24] for picture in tile.pictures)


def test_sample_depends_on_the_seed_alone(site: SiteData) -> None:
    mixed(site, 12)

    first, again = (make_contact_sheet(site, num_cases=4, seed=1) for _ in range(2))
    samples = {
        frozenset(tile.case_id for tile in make_contact_sheet(site, num_cases=4, seed=seed).tiles)
        for seed in range(3)
    }

    assert first == again
    assert len(first.tiles) == 4
    assert first.num_cases == 13
    assert len(samples) > 1


def test_file_that_cannot_be_decoded_is_named_and_the_others_are_shown(site: SiteData) -> None:
    rows: list[list[object]] = []
    flat = np.full((32, 32), 7, np.uint16)
    put(site, rows, 0, "flat", a_radiograph("flat", flat))
    broken = a_dataset(flat, SOPInstanceUID=a_uid("broken"), PatientID="CNRYB")
    broken.PixelData = encapsulate([b"CNRY no code stream"])
    broken["PixelData"].is_undefined_length = True
    put(site, rows, 1, "broken", encode(broken, "1.2.840.10008.1.2.4.90"))
    write_labels(site.labels, rows)
    index_folder(site)

    sheet = make_contact_sheet(site)

    assert sheet.num_faults == 1
    (faulty,) = [tile for tile in sheet.tiles if tile.fault]
    assert faulty.pictures == ()
    assert faulty.label == "1"
    assert "1 of them cannot be shown" in render_contact_sheet(sheet)


def test_file_that_changed_since_it_was_indexed_ends_the_sheet(site: SiteData) -> None:
    mixed(site, 2)
    (site.dicom / "0.dcm").write_bytes((site.dicom / "1.dcm").read_bytes())

    with pytest.raises(CohortError, match="changed or vanished"):
        make_contact_sheet(site)


def test_file_that_another_command_finds_gone_meanwhile_ends_the_sheet(
    site: SiteData, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(site, 2)

    def overtaken(site: SiteData) -> Cohort:
        cohort = open_cohort(site)
        next(site.dicom.iterdir()).unlink()
        index_folder(site)
        return cohort

    monkeypatch.setattr("fedward_client.contact_sheet.open_cohort", overtaken)

    with pytest.raises(CohortError, match="changed or vanished"):
        make_contact_sheet(site)


def test_page_holds_no_identifier_and_only_its_owner_reads_it(
    mixed_site: SiteData, sheet: ContactSheet, tmp_path: Path
) -> None:
    path = write_contact_sheet(tmp_path, sheet)

    again = write_contact_sheet(tmp_path, sheet)

    page = path.read_bytes()
    assert again == path == tmp_path / "contact-sheet.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plain = re.sub(rb"data:image/png;base64,[A-Za-z0-9+/=]*", b"", page)
    for secret in (b"CNRY", a_uid("us").encode(), str(mixed_site.dicom).encode(), b"http:", b"https:"):
        assert secret not in plain
    for tile in sheet.tiles:
        for picture in tile.pictures:
            assert Image.open(io.BytesIO(picture.png)).info == {}
    purge(tmp_path)
    assert not path.exists()


def test_full_disk_leaves_the_earlier_page(sheet: ContactSheet, tmp_path: Path) -> None:
    path = write_contact_sheet(tmp_path, sheet)
    before = path.read_bytes()

    with a_disk_of(1000), pytest.raises(CohortError, match="cannot be written"):
        write_contact_sheet(tmp_path, sheet)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_command_writes_the_page_and_says_what_is_on_it(
    mixed_site: SiteData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for options, expected in ((["--json"], "{"), (["--cases", "2", "--seed", "7"], "2 of 5 cases are on")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["cohort", "contact-sheet", "--home", str(mixed_site.home), *options])
        said = capsys.readouterr()
        assert ended.value.code == 0
        assert said.out.startswith(expected)
        if options == ["--json"]:
            document = json.loads(said.out)
            assert document["of"] == len(document["cases"]) == 5
            assert {case["decision"] for case in document["cases"]} == {"train", "mask"}
    assert (mixed_site.home / "contact-sheet.html").exists()


def opened(browser: Browser, path: Path, width: int, complaints: list[str]) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: (
            complaints.append(request.url[:80])
            if request.url != path.as_uri() and not request.url.startswith("data:image/png;base64,")
            else None
        ),
    )
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("width", [360, 1280])
def test_page_shows_every_picture_and_enlarges_one(
    sheet: ContactSheet, browser: Browser, tmp_path: Path, width: int
) -> None:
    path = write_contact_sheet(tmp_path, sheet)
    complaints: list[str] = []

    page = opened(browser, path, width, complaints)

    assert complaints == []
    pictures = page.locator("img")
    assert pictures.count() == 5
    assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("h2").all_inner_texts() == ["Masked by the gate (1)", "As they are (4)"]
    page.locator("label").first.click()
    box = pictures.first.bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (width, 900)
    page.locator("label").first.click(position={"x": 5, "y": 5}, force=True)
    box = pictures.first.bounding_box()
    assert box is not None
    assert box["height"] < 300
    page.close()


def test_hostile_label_is_text(browser: Browser, tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    tile = Tile("c" * 32, HOSTILE, "train", "CR", "train", (Picture(png.getvalue(), ""),))
    path = write_contact_sheet(tmp_path, ContactSheet((tile,), 1, 0))
    complaints: list[str] = []

    page = opened(browser, path, 800, complaints)

    assert complaints == []
    assert page.locator("figcaption b").inner_text() == HOSTILE
    assert page.locator("script").count() == 0
    page.close()


@pytest.mark.data
def test_real_radiographs_are_recognisable(site: SiteData, shared_data: Path) -> None:
    """Each thumbnail resembles its own radiograph more than any other."""
    folder = shared_data / "hannover-cxr-longitudinal"
    with (folder / "metadata.csv").open(newline="") as file:
        found = list(csv.DictReader(file))[:8]
    rows: list[list[object]] = []
    originals = []
    for row in found:
        pixels = np.array(Image.open(folder / "images" / row["filename"]).convert("L"))
        originals.append(pixels)
        put(site, rows, row["view"], row["filename"], a_radiograph(row["filename"], pixels))
    write_labels(site.labels, rows)
    index_folder(site)

    sheet = make_contact_sheet(site)

    assert len(sheet.tiles) == 8
    shown = [_small(pixels_of(tile.pictures[0])) for tile in sheet.tiles]
    nearest = {int(np.argmax([np.corrcoef(each, _small(one))[0, 1] for one in originals])) for each in shown}
    assert nearest == set(range(8))


def _small(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.array(Image.fromarray(picture).resize((32, 32)), float).ravel()
