"""Spell an identifier in every way in which a copy might still hold it: what the byte scan looks for.

A search must neither miss nor cry wolf: an ID "1" occurs in every file, and three letters occur in any
megabyte of pixels. So each spelling says where it may be looked for. Short ones need word boundaries
and are looked for in front of the pixels only; what is shorter than three characters, or a word that
every DICOM file may hold (HEAD, NONE, REMOVED), is not searched for and counted instead.
"""

from __future__ import annotations

import base64
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import accumulate

from fedward_client.dicom.identifiers import Identifier, SourceText

NOTATIONS = ("text", "file's own character set", "utf-16", "base64", "hex", "reversed", "bytes")
"""How a spelling may be told in a report."""

SHORTEST_NAME_PART = 3
SHORTEST_TEXT = 4
SHORTEST_NUMBER = 5
LONG_NUMBER = 7
SHORTEST_UID = 8
IN_PIXELS = 8
"""Bytes that a spelling must have to be looked for among pixels."""

_SHORTEST_ENCODED = 6  # characters behind base64, hex and reversed text
_LONGEST = 64  # of a longer value this much is looked for, from its start and from its middle
_WINDOW, _MOST_WINDOWS, _MOST_WORDS = 24, 16, 200
_LARGEST_CACHED = 1024

PUBLIC_WORDS = frozenset(
    (  # noqa: SIM905 - a list of words reads better as text
        "abdomen ankle anonymous anonymized arm axial back bladder body brain breast cardiac cervical chest "
        "clavicle contrast coronal cspine default derived dicom elbow extremity eye face femur finger foot "
        "hand head headneck heart hip image iso_ir jaw kidney knee left leg liver localizer lspine lumbar "
        "lung magnitude male female mosaic neck nobody none normal null original other patient pelvis "
        "phantom phase primary prostate right removed research routine sagittal secondary series shoulder "
        "skull spine standard study subject test thorax tspine unknown volume wholebody wrist yes "
        "name text code scan mri perfusion pancreas "
        "public clinical hospital radiology department science university medical center centre systems"
    ).split()
)
"""Words of DICOM itself and of hospitals at large; alone they name nobody."""

_OTHER_ENCODINGS = (
    *("shift_jis", "euc_jp", "iso2022_jp", "euc_kr", "gb18030", "iso8859_2", "iso8859_5", "iso8859_6"),
    *("iso8859_7", "iso8859_8", "cp1250", "cp1251", "cp1253", "koi8_r"),
)
_ESCAPE = re.compile(rb"\x1b[\x20-\x2f]+[\x30-\x7e]")
_LONG_NUMBER = re.compile(r"[0-9]{6,}")
_DATE = re.compile(r"(\d{4})[.\-/]?(\d\d)[.\-/]?(\d\d)(.*)", re.ASCII | re.DOTALL)
_EAST_ASIAN = re.compile(r"[\u2e80-\ufaff\U00020000-\U0003ffff]{2,}")
_APOSTROPHES = re.compile("['\u2019\u2018`\u00b4]")
_GROUPING = re.compile(r"[ .\-/]")
_GROUPS = ((3, 2, 4), (3, 3, 3), (3, 3, 4), (6, 4), (6, 5), (3, 3, 3, 2), (8, 4), (4, 4, 4), (4, 4))
_TWO_LETTERS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})
_TWO_LETTERS |= str.maketrans({"ß": "ss", "æ": "ae", "ø": "oe", "å": "aa", "Æ": "Ae", "Ø": "Oe", "Å": "Aa"})
_ONE_LETTER = str.maketrans({"ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ø": "o", "Ø": "O", "ı": "i", "ß": "ss"})
_SEPARATORS = re.compile(r"[\^=\s,;._\-/\\|()]+")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class Needle:
    """One spelling of one identifier.

    Args:
        pattern: bytes to look for; ASCII letters are small when `folded`.
        notation: how it is spelled, for the report: "text", "utf-16", "base64", "reversed", ...
        folded: compare without regard to the case of ASCII letters.
        bounded: bytes that must not stand directly before or behind; b"" when that does not matter.
        in_pixels: long enough to be looked for among pixels too.
    """

    pattern: bytes = field(repr=False)
    notation: str
    folded: bool = False
    bounded: bytes = field(repr=False, default=b"")
    in_pixels: bool = False


@dataclass(frozen=True)
class NeedleSet:
    """Everything to look for in one copy.

    Args:
        needles: all spellings, each with the DICOM keyword of the element that held the value.
        num_searched: identifiers that are looked for.
        num_not_searched: identifiers too short, too common or too plain to be looked for, and numbers.
    """

    needles: tuple[tuple[Needle, str], ...] = field(repr=False)
    num_searched: int
    num_not_searched: int


def needles_of(source: SourceText, written: Iterable[str] = ()) -> NeedleSet:
    """Spell all identifiers of a source file.

    Args:
        source: what its copy must not hold.
        written: replacement values in the copy (shifted dates, new UIDs); a date of the source that is
            by chance also the shifted form of another one cannot be told apart, and is not searched for.
    """
    replacements = frozenset(written)
    needles: dict[tuple[bytes, bool], tuple[Needle, str]] = {}
    num_searched = 0
    for identifier in source.identifiers:
        if _means_something(identifier, source.kept, replacements):
            small = len(identifier.raw) + len(identifier.text) <= _LARGEST_CACHED
            spelled = _spelled(identifier) if small else _spelled.__wrapped__(identifier)
            num_searched += bool(spelled)
            for needle in spelled:
                needles.setdefault((needle.pattern, needle.folded), (needle, identifier.keyword))
    not_searched = len(source.identifiers) - num_searched + source.num_numbers
    return NeedleSet(tuple(needles.values()), num_searched, not_searched)


def _means_something(identifier: Identifier, kept: frozenset[str], written: frozenset[str]) -> bool:
    text = identifier.text
    if identifier.kind == "text":
        return identifier.direct or text.lower() not in kept
    if identifier.kind == "date":
        return not {text, text[:8], text.replace(".", "")} & written
    return text not in written


@lru_cache(maxsize=50_000)
def _spelled(identifier: Identifier) -> tuple[Needle, ...]:
    """All spellings; files of one study share nearly all their identifiers."""
    text = identifier.text
    if identifier.kind == "bytes":
        found = _windows(identifier.raw)
    elif identifier.kind == "date":
        found = _dates(text)
    elif identifier.kind == "time":
        found = _times(text)
    elif identifier.kind == "uid":
        found = _encoded(text, (), _IN_NUMBERS) if len(text) >= SHORTEST_UID else iter(())
    elif identifier.kind == "name":
        found = _names(identifier)
    else:
        found = _texts(identifier)
    return tuple(dict.fromkeys(found))


_DIGITS = b"0123456789"
_IN_NUMBERS = _DIGITS + b"."
_IN_WORDS = _DIGITS + string.ascii_letters.encode()
_IN_CODES = _IN_WORDS + b"."


def _names(identifier: Identifier) -> Iterator[Needle]:
    """A person's name as a whole, in several orders, and each part of three letters or more."""
    for group in identifier.text.split("="):
        parts = [part for part in _SEPARATORS.split(group) if part]
        telling = [part for part in parts if part.lower() not in PUBLIC_WORDS]
        if telling and len(parts) > 1:
            for joined in (group, " ".join(parts), " ".join(parts[::-1]), ", ".join(parts), "_".join(parts)):
                yield from _encoded(joined, identifier.encodings, _IN_WORDS)
            for joined in ("".join(parts), "".join(parts[::-1])):
                if len(joined) >= _SHORTEST_ENCODED or _EAST_ASIAN.fullmatch(joined):
                    yield from _encoded(joined, identifier.encodings, b"")
        telling += [_APOSTROPHES.sub("", part) for part in telling if _APOSTROPHES.search(part)]
        for part in telling:
            if len(part) >= SHORTEST_NAME_PART or (len(part) >= 2 and not part.isascii()):
                yield from _encoded(part, identifier.encodings, _IN_WORDS)
    yield from _raw(identifier)


def _texts(identifier: Identifier) -> Iterator[Needle]:
    """Any other text: as a whole, and each word of it that looks like a number or an address."""
    text = identifier.text
    words = [word for word in _SEPARATORS.split(text) if word]
    if all(word.lower() in PUBLIC_WORDS for word in words):
        return
    if text.isascii() and _GROUPING.sub("", text).isdigit():
        stripped = text.lstrip("0")
        spelled = {text, stripped} if len(stripped) >= SHORTEST_NUMBER else {text}
        for digits in spelled | set(_grouped(_GROUPING.sub("", text))):
            if len(digits) >= SHORTEST_NUMBER and len(set(digits)) > 2:
                # A long one is the patient's even in MRN8837261.
                yield from _encoded(digits, (), _IN_NUMBERS if len(digits) >= LONG_NUMBER else _IN_CODES)
        return
    if len(text) >= SHORTEST_TEXT or not text.isascii():
        for start in {0, len(text) // 2} if len(text) > _LONGEST else {0}:
            yield from _encoded(text[start : start + _LONGEST], identifier.encodings, _IN_WORDS)
    for word in words[:_MOST_WORDS] if len(words) > 1 else ():
        telling = any(character.isdigit() for character in word) and len(set(word)) > 2
        if telling and len(word) >= SHORTEST_NUMBER:
            yield from _encoded(word, identifier.encodings, _IN_CODES)
    yield from _numbers_within(text)
    yield from _raw(identifier)


def _grouped(digits: str) -> Iterator[str]:
    """A number without signs in between, and as the numbers of insurances and registers are written."""
    yield digits
    for sizes in _GROUPS:
        if sum(sizes) == len(digits):
            ends = list(accumulate(sizes))
            parts = [digits[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            yield from (separator.join(parts) for separator in " -.")


def _numbers_within(text: str) -> Iterator[Needle]:
    """Long numbers with letters around them, as in MRN8837261."""
    for number in _LONG_NUMBER.findall(text)[:_MOST_WORDS]:
        for digits in {number, number.lstrip("0")}:
            if len(digits) < SHORTEST_NUMBER or len(set(digits)) < 3:
                continue
            yield from _encoded(digits, (), _IN_NUMBERS if len(digits) >= LONG_NUMBER else _IN_CODES)


def _dates(text: str) -> Iterator[Needle]:
    match = _DATE.match(text.strip())
    if match is None:
        return
    try:
        day = date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return
    if day.year < 1800:
        return
    year, month, in_month = match[1], match[2], match[3]
    spelled = [year + month + in_month]
    spelled += [separator.join((year, month, in_month)) for separator in "-./"]
    spelled += [separator.join((in_month, month, year)) for separator in "-./"]
    spelled += [separator.join((month, in_month, year)) for separator in "-./"]
    spelled += [in_month + month + year, month + in_month + year]
    name = _MONTHS[day.month - 1]
    spelled += [f"{day.day} {name} {year}", f"{in_month}-{name}-{year}", f"{name} {day.day}, {year}"]
    spelled += [f"{in_month} {name} {year}", f"{in_month}{name}{year}", f"{in_month}-{name}-{year[2:]}"]
    for form in spelled:
        yield from _encoded(form, (), _IN_NUMBERS if form.isdigit() else _DIGITS)


def _times(text: str) -> Iterator[Needle]:
    """A time of day to the second; a full or half hour is no one's alone."""
    digits = text.partition(".")[0].replace(":", "")
    if len(digits) == 6 and digits.isdigit() and len(set(digits)) > 2 and not digits.endswith("00"):
        yield Needle(digits.encode(), "text", bounded=_IN_CODES)


def _raw(identifier: Identifier) -> Iterator[Needle]:
    """The value's own bytes, component by component, with and without switches of character set."""
    if identifier.raw.isascii() and b"\x1b" not in identifier.raw:
        return
    for part in re.split(rb"[\^=\s]", identifier.raw):
        for pattern in {part, _ESCAPE.sub(b"", part)}:
            if len(pattern) >= SHORTEST_TEXT and not pattern.isascii():
                yield Needle(pattern[:_LONGEST], "file's own character set", in_pixels=_is_long(pattern))


def _encoded(text: str, encodings: tuple[str, ...], bounded: bytes) -> Iterator[Needle]:
    """One text in all character sets and disguises."""
    for form in _letter_forms(text):
        for encoding in ("utf-8", "latin-1", *encodings, *(() if form.isascii() else _OTHER_ENCODINGS)):
            with suppress(UnicodeError, LookupError):
                yield from _plain(form.encode(encoding), encoding, bounded)
        for encoding in ("utf-16-le", "utf-16-be"):
            with suppress(UnicodeError):
                yield from _wide(form.encode(encoding))
    if len(text) >= _SHORTEST_ENCODED:
        with suppress(UnicodeError):
            yield from _disguised(text, bounded)


def _letter_forms(text: str) -> list[str]:
    """As written, in capitals, small, and without accents (Jérôme, JEROME)."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = [text.translate(_TWO_LETTERS), bare.translate(_ONE_LETTER)]  # Müller is also Mueller
    written = [form for each in (text, bare, *plain) for form in (each, each.upper(), each.lower())]
    forms = dict.fromkeys(written)
    return [form for form in forms if form]


def _plain(pattern: bytes, encoding: str, bounded: bytes) -> Iterator[Needle]:
    if len(pattern) < SHORTEST_NAME_PART or len(set(pattern)) < 2:
        return
    notation = "text" if encoding in ("utf-8", "latin-1") else "file's own character set"
    if pattern.isascii():
        yield Needle(pattern.lower(), notation, folded=True, bounded=bounded)
        if _is_long(pattern):  # among pixels only as it is spelled: fewer chance hits
            yield Needle(pattern, notation, bounded=bounded, in_pixels=True)
    elif len(pattern) >= SHORTEST_TEXT:
        yield Needle(pattern, notation, in_pixels=_is_long(pattern))


def _wide(pattern: bytes) -> Iterator[Needle]:
    if len(pattern) >= 2 * SHORTEST_TEXT:
        yield Needle(pattern.lower(), "utf-16", folded=True)
        if len(pattern) >= 2 * IN_PIXELS:
            yield Needle(pattern, "utf-16", in_pixels=True)


def _disguised(text: str, bounded: bytes) -> Iterator[Needle]:
    coded = text.encode("utf-8")
    for form in (text, text.upper(), text.lower()):
        for shift in range(3):  # where the value falls in groups of three bytes
            whole = base64.b64encode(b"\0" * shift + form.encode("utf-8"))
            num_bits = 8 * (shift + len(form.encode("utf-8")))
            stable = whole[(0, 2, 3)[shift] : num_bits // 6]
            if len(stable) >= _SHORTEST_ENCODED:
                yield Needle(stable, "base64", in_pixels=_is_long(stable))
    yield Needle(coded.hex().encode(), "hex", folded=True)
    for digits in (coded.hex(), coded.hex().upper()):
        yield Needle(digits.encode(), "hex", in_pixels=True)
    backwards = text[::-1].encode("utf-8")
    if backwards.lower() != coded.lower():
        yield Needle(backwards.lower(), "reversed", folded=True, bounded=bounded)
        if _is_long(backwards):
            yield Needle(backwards, "reversed", bounded=bounded, in_pixels=True)


def _windows(raw: bytes) -> Iterator[Needle]:
    """Samples of a long value of unknown form."""
    step = max(_WINDOW, (len(raw) - _WINDOW) // _MOST_WINDOWS + 1)
    for start in range(0, max(1, len(raw) - _WINDOW + 1), step):
        window = raw[start : start + _WINDOW]
        if len(set(window)) >= 8:
            yield Needle(window, "bytes", in_pixels=True)


def _is_long(pattern: bytes) -> bool:
    return len(pattern) >= IN_PIXELS
