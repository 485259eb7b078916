"""From a case's files to the array that a network is fed: decode, mask, window, resize (hop 4).

Decoding runs in the sandbox's processes, the rest in threads of this one, several cases at a time and
their results in order. A file that cannot be used goes to quarantine and its case is passed over.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.array_shard import Row
from fedward_client.cohort import Case
from fedward_client.decoders import decoders
from fedward_client.dicom.frames import Frames
from fedward_client.dicom.gate import Box, mask
from fedward_client.dicom.intensity import FILE, Intensity, frames_in_unit_interval, in_unit_interval
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox, Outcome, SiteFile
from fedward_client.dicom.volume import assemble
from fedward_client.dicom.volume_grid import resample
from fedward_client.index import Progress
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import TrainingPlan, TransformPart
from fedward_common.registry import TRANSFORMS

PREPARATION_VERSION = 2
"""Part of the key of prepared arrays: it grows when the same files would give other values."""

MAX_DECODERS = 16
_FILES_A_DECODER = 32
"""For fewer files than these, starting another takes longer than it saves."""

Values = NDArray[np.float32]
Quarantine = Callable[[str, UnusableImageError], None]

# BT.601, as in DICOM's own YBR_FULL: grey is what a viewer without colour would show.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Files:
    """Where contents lie.

    Args:
        site: whose folder.
        names: content -> name of a file that holds it.
        quarantine: takes a content that cannot be used.
    """

    site: SiteData
    names: Mapping[str, bytes]
    quarantine: Quarantine

    def of(self, content: str) -> SiteFile:
        """The file that must still hold this content: labels and split belong to it.

        Raises:
            CohortError: no file does.
        """
        name = self.names.get(content)
        if name is None:
            raise CohortError(
                "an image file changed or vanished while it was being prepared",
                remedy="Wait until the transfer into the image folder is finished, then start again.",
            )
        return SiteFile(self.site.dicom, name, content)


def row_of(case: Case) -> Row:
    """What a case is to the cache: its files, and what is done to it alone."""
    key = case.content
    if case.regions is not None:
        key = hashlib.sha256(f"{key} {[tuple(box) for box in case.regions]}".encode()).hexdigest()
    return Row(key, tuple(dict.fromkeys(content for content, _ in case.parts)))


class Preparation:
    """Prepares cases of one plan.

    Args:
        plan: gives the window, the size and the pipeline.
        files: where the cases' contents are.
        cases: every case that may be asked for.
        as_radiographs: decode as radiographs for presentation, with the window of the file.
        processors: how many may decode.
        progress: told how many cases are done of those asked for.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        files: Files,
        cases: Sequence[Case],
        *,
        as_radiographs: bool,
        processors: int,
        progress: Progress | None = None,
    ) -> None:
        transform = TRANSFORMS.load(plan.transforms.name)
        self._preprocess = transform.preprocess(plan)
        self._colour = transform.channels == 3
        self._transforms = plan.transforms
        self._intensity = intensity_of(plan.transforms)
        self._files, self._case_of = files, {row_of(case).key: case for case in cases}
        self._as_radiographs, self._processors, self._progress = as_radiographs, processors, progress

    def __call__(self, rows: Sequence[Row]) -> Iterator[Values | None]:
        """Give the array of each row, or None where its file went to quarantine.

        Raises:
            CohortError: a file changed or vanished, or the decoders do not start.
        """
        cases = [self._case_of[row.key] for row in rows]
        num_files = sum(len(row.contents) for row in rows)
        wanted = min(self._processors, MAX_DECODERS, -(-num_files // _FILES_A_DECODER))
        with decoders(wanted) as sandbox:
            arrays = self._volumes if cases[0].geometry is not None else self._images
            for number, values in enumerate(arrays(sandbox, cases), start=1):
                if self._progress is not None:
                    self._progress(number, len(cases))
                yield values

    def _images(self, sandbox: DecodeSandbox, cases: Sequence[Case]) -> Iterator[Values | None]:
        files = (self._files.of(case.content) for case in cases)
        outcomes = sandbox.map(files, "image" if self._as_radiographs else "frames", lend=True)
        with ThreadPoolExecutor(min(self._processors, 8)) as threads:
            waiting: deque[tuple[Case, Future[Values]]] = deque()
            for case, outcome in zip(cases, outcomes, strict=True):
                waiting.append((case, threads.submit(self._image, case, outcome)))
                if len(waiting) > 2 * self._processors:
                    yield self._result(*waiting.popleft())
            while waiting:
                yield self._result(*waiting.popleft())

    def _result(self, case: Case, future: Future[Values]) -> Values | None:
        try:
            return future.result()
        except UnusableImageError as error:
            self._files.quarantine(case.content, error)
            return None

    def _image(self, case: Case, outcome: Outcome) -> Values:
        """Mask, window and resize one decoded image."""
        if isinstance(outcome, CohortError):
            raise outcome
        if isinstance(outcome, Frames):
            image = self._shown(_masked(outcome, case.regions), case)
        else:
            assert isinstance(outcome, np.ndarray)
            image = outcome if case.regions is None else mask(outcome, case.regions)
        if self._colour:
            image = image.transpose(2, 0, 1) if image.ndim == 3 else np.stack([image] * 3)
        prepared: Values = self._preprocess(image).numpy()
        if not np.isfinite(prepared).all():  # of a decoder that was taken over; one would spoil a whole round
            raise UnusableImageError(Reason.DISPLAY_VALUES)
        return prepared

    def _shown(self, frames: Frames, case: Case) -> Values:
        if len(frames.values) != 1:  # which of them was meant is not for us to say
            raise UnusableImageError(Reason.MULTI_FRAME)
        _check_units(frames.units, case, self._intensity)
        image: Values = frames_in_unit_interval(frames, self._intensity)[0]
        return image @ _LUMA if frames.is_colour and not self._colour else image

    def _volumes(self, sandbox: DecodeSandbox, cases: Sequence[Case]) -> Iterator[Values | None]:
        """Decoders work ahead into the next volume while one is put together."""
        wanted = [_contents_in_order(case) for case in cases]
        stream = sandbox.map((self._files.of(content) for content in chain(*wanted)), "frames", lend=True)
        for case, contents in zip(cases, wanted, strict=True):
            slices = _SliceFrames(stream, contents, case.regions, self._decode_alone(sandbox))
            try:
                yield self._volume(case, slices)
            except UnusableImageError as error:
                at_fault = [slices.refused] if slices.refused else {content for content, _ in case.parts}
                for content in sorted(at_fault):
                    self._files.quarantine(content, error)
                yield None
            slices.pass_over()

    def _decode_alone(self, sandbox: DecodeSandbox) -> Callable[[str], Outcome]:
        def decode(content: str) -> Outcome:
            (outcome,) = sandbox.map([self._files.of(content)], "frames")
            return outcome

        return decode

    def _volume(self, case: Case, slices: Mapping[str, Frames]) -> Values:
        assert case.geometry is not None
        volume = assemble(case.geometry, slices)
        _check_units(volume.units, case, self._intensity)
        shown = in_unit_interval(
            volume.values,
            self._intensity,
            inverted=volume.inverted,
            window=volume.window,
            voi_function=volume.voi_function,
        )
        # From here on 0 is black, and so is what lies outside.
        volume = replace(volume, values=shown, inverted=False, fill=0.0)
        slices_rows_columns = self._transforms.size
        assert len(slices_rows_columns) == 3
        volume = resample(
            volume, self._transforms.spacing_mm, slices_rows_columns, view=self._transforms.view
        )
        image = np.stack([volume.values] * 3) if self._colour else volume.values
        prepared: Values = self._preprocess(image).numpy()
        return prepared


class _SliceFrames(Mapping[str, Frames]):
    """Decoded files of one volume, taken from a stream in the order in which they are asked for.

    Attributes:
        refused: content that a decoder refused.
    """

    def __init__(
        self,
        stream: Iterator[Outcome],
        contents: Sequence[str],
        regions: tuple[Box, ...] | None,
        decode: Callable[[str], Outcome],
    ) -> None:
        self._stream, self._regions, self._decode = stream, regions, decode
        self._ahead = deque(contents)
        self._held: tuple[str, Frames] | None = None
        self._contents = tuple(contents)
        self.refused = ""

    def __getitem__(self, content: str) -> Frames:
        if self._held is not None and self._held[0] == content:
            return self._held[1]
        outcome = self._ahead_to(content) if content in self._ahead else self._decode(content)
        if isinstance(outcome, CohortError):
            self.refused = content
            raise outcome
        assert isinstance(outcome, Frames)
        frames = _masked(outcome, self._regions)
        self._held = (content, frames)
        return frames

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._contents))

    def __len__(self) -> int:
        return len(set(self._contents))

    def pass_over(self) -> None:
        """Take from the stream what was not asked for."""
        for _ in self._ahead:
            next(self._stream)
        self._ahead.clear()

    def _ahead_to(self, content: str) -> Outcome:
        while True:
            outcome = next(self._stream)
            if self._ahead.popleft() == content:
                return outcome


def intensity_of(transforms: TransformPart) -> Intensity:
    """The plan's window."""
    if transforms.window == "file":
        return FILE
    if transforms.window == "percentiles":
        return Intensity("percentiles", *transforms.percentiles)
    return Intensity("units", *transforms.window)


def _check_units(units: str, case: Case, intensity: Intensity) -> None:
    """See that a window that the plan gives for CT, which is in HU, meets HU.

    Raises:
        UnusableImageError: the file has no rescale, or says that its values are something else.
    """
    if intensity.kind == "units" and case.modality == "CT" and units != "HU":
        raise UnusableImageError(Reason.NOT_HOUNSFIELD)


def _contents_in_order(case: Case) -> list[str]:
    """Files of a volume as `assemble` asks for them: alleged copies first, then slice by slice."""
    assert case.geometry is not None
    order = [each.content for pair in case.geometry.copies for each in pair]
    order += [each.content for each in case.geometry.slices]
    return [content for place, content in enumerate(order) if place == 0 or order[place - 1] != content]


def _masked(frames: Frames, regions: tuple[Box, ...] | None) -> Frames:
    if regions is None:
        return frames
    values: NDArray[Any] = mask(frames.values, regions, inverted=frames.inverted)
    return replace(frames, values=values)
