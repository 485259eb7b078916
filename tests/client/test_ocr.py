"""Looking for text with the real tesseract: what is burned in is found, what is not there is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fedward_client import ocr
from fedward_client.dicom.frames import decode_frames
from fedward_client.ocr import find_tesseract, find_text
from fedward_common.errors import UsageError

pytestmark = pytest.mark.needs("tesseract")


def tissue(seed: int = 7) -> NDArray[np.uint8]:
    """Smooth grey noise, as dark as lungs and as bright as bone."""
    random = np.random.default_rng(seed)
    coarse = random.integers(20, 215, (16, 16), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC))


def burned(picture: NDArray[np.uint8], text: str, grey: int, height: int = 22) -> NDArray[np.uint8]:
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).text((30, 40), text, fill=grey, font=ImageFont.load_default(size=height))
    return np.asarray(image)


@pytest.mark.parametrize(
    ("ground", "grey"), [(tissue(), 255), (tissue() // 2 + 128, 0)], ids=["bright", "dark on a page"]
)
def test_text_burned_in_is_found_where_it_stands(ground: NDArray[np.uint8], grey: int) -> None:
    found = find_text(burned(ground, "MUELLER HANS 1957", grey), find_tesseract())
    assert {"MUELLER", "HANS", "1957"} <= {word.text.upper() for word in found}
    (name,) = (word for word in found if word.text.upper() == "MUELLER")
    assert 35 <= name.row <= 60
    assert 20 <= name.column <= 40
    assert "MUELLER" not in repr(found)


def test_nothing_is_found_where_there_is_no_text() -> None:
    assert find_text(tissue(), find_tesseract()) == ()


def test_name_on_a_real_ultrasound_picture_is_found() -> None:
    """A test file whose picture shows a hospital's settings as text; looked at."""
    path = Path(pydicom.data.__file__).parent / "test_files" / "examples_palette.dcm"
    picture = decode_frames(path.read_bytes()).values[0].max(axis=2)
    assert len(find_text(picture, find_tesseract())) >= 3


def test_missing_or_broken_tesseract_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="failed"):
        find_text(tissue(), "/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        ocr.find_tesseract()
    assert "tesseract-ocr" in caught.value.remedy
