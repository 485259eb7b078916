"""Write the facts about the slices of one file as a line of text for the index, and read them back (hop 2).

Two JSON values divided by a line feed: what the slices share and what most files of a series share with
them, without what is at its default; then the number of slices and what is each slice's own. The first is
the same text for hundreds of files and is parsed once: opening a cohort of 300,000 slices is a matter of
seconds. Whoever reads trusts nothing: the text comes from the process that may be taken over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any

from fedward_client.dicom.slice_facts import Content, SliceFacts

_OF_FILE = ("content", "series", "study", "modality")
_OF_SLICE = (
    "frame_index",
    "position",
    "instance_number",
    "acquisition_number",
    "acquisition_time",
    "trigger",
)
_MAX_SLICES = 2**17
_MAX_VALUES = 64
_MAX_TEXT = 1024

_DEFAULTS = {each.name: each.default for each in fields(SliceFacts) if each.name not in _OF_FILE}


def slices_to_text(slices: Sequence[SliceFacts]) -> str:
    """Write the facts about the slices of one file; what the index knows of the file anyway is left out.

    Args:
        slices: at least one, as `read_slice_facts` gives them.
    """
    shared: dict[str, Any] = {}
    own: dict[str, list[Any]] = {}
    for name, default in _DEFAULTS.items():
        values = [_bounded(getattr(each, name)) for each in slices]
        if name in _OF_SLICE or any(value != values[0] for value in values):
            if default is MISSING or any(value != default for value in values):
                own[name] = values
        elif values[0] != default:
            shared[name] = values[0]
    if own["frame_index"] == list(range(len(slices))):
        del own["frame_index"]
    return f"{_json(shared)}\n{_json([len(slices), own])}"


def slices_from_text(
    text: str, *, content: Content, series: str, study: str, modality: str
) -> list[SliceFacts]:
    """Undo `slices_to_text`; the other arguments are what the index knows of the file.

    Raises:
        ValueError: the text is none of them.
    """
    first, _, second = text.partition("\n")
    common = {"content": content, "series": series, "study": study, "modality": modality, **_shared(first)}
    try:
        number, own = json.loads(second)
        columns = {name: [_FORMS[name](value) for value in values] for name, values in own.items()}
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("not the facts about slices") from None
    if type(number) is not int or not 1 <= number <= _MAX_SLICES:
        raise ValueError("not the facts about slices")
    columns.setdefault("frame_index", list(range(number)))
    if any(len(values) != number for values in columns.values()) or not common.keys().isdisjoint(columns):
        raise ValueError("not the facts about slices")
    try:
        names = tuple(columns)
        return [
            SliceFacts(**common, **dict(zip(names, values, strict=True)))
            for values in zip(*columns.values(), strict=True)
        ]
    except TypeError:  # a fact is missing that has no default
        raise ValueError("not the facts about slices") from None


@lru_cache(maxsize=1024)
def _shared(text: str) -> Mapping[str, Any]:
    try:
        return {name: _FORMS[name](value) for name, value in json.loads(text).items()}
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("not the facts about slices") from None


def _bounded(value: Any) -> Any:
    """What a malformed header holds too much of is cut, so that what is written can be read."""
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if isinstance(value, tuple):
        return tuple(_bounded(each) for each in value[:_MAX_VALUES])
    return None if isinstance(value, int) and abs(value) >= 2**63 else value


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _integer(value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError("not an integer")
    return value


def _real(value: object) -> float:
    if type(value) is not float:
        return float(_integer(value))
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError("not a text")
    return value


def _values(of: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > _MAX_VALUES:
            raise ValueError("not a list")
        return tuple(map(of, value))

    return read


def _or_none(of: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else of(value)


_FORMS: Mapping[str, Callable[[object], Any]] = {
    **dict.fromkeys(("frame_index", "rows", "columns"), _integer),
    **dict.fromkeys(("acquisition_time", "frame_of_reference", "stack", "concatenation"), _text),
    **dict.fromkeys(("position", "orientation", "pixel_spacing"), _or_none(_values(_real))),
    **dict.fromkeys(
        (
            *("instance_number", "acquisition_number", "temporal_position", "echo"),
            *("part", "num_parts"),
        ),
        _or_none(_integer),
    ),
    **dict.fromkeys(
        (
            *("echo_time", "trigger", "b_value"),
            *("slice_thickness", "spacing_between", "gantry_tilt"),
        ),
        _or_none(_real),
    ),
    "image_type": _values(_text),
    "dimensions": _values(_integer),
}
