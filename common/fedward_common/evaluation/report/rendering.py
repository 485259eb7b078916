"""What every page is made with: the template engine, the style sheet and script, the policy of the page.

A page is a single file that asks the network for nothing: a content security policy in it allows only
its own style sheet and script, both by hash, so that not even a hostile name that slipped through
escaping could load or run anything.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedward_common.evaluation.report import words

_HERE = Path(__file__).resolve().parent


def render_page(template: str, folder: Path = _HERE, **values: Any) -> str:
    """Render a template as one self-contained HTML page, every text escaped.

    Args:
        template: name of its file.
        folder: where it lies; the macros that pages share are found as well.
        values: what the template uses besides `style`, `script`, `policy` and `words`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _asset("report.css"), _asset("report.js")
    return environment.get_template(template).render(
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        words=words,
        **values,
    )


def plan_sections(plan: BaseModel) -> list[tuple[str, list[tuple[str, str]]]]:
    """Spell the plan out: general settings first, then one section a part, empty values as a dash."""
    document = plan.model_dump(mode="json")
    general = [(key, _plain(value)) for key, value in document.items() if not isinstance(value, dict)]
    sections = [("general", general)]
    for name, part in document.items():
        if isinstance(part, dict):
            sections += _sections(name, part)
    return sections


def _sections(name: str, part: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """One section for a part's own settings and one for each part inside it."""
    sections = [(name, [(key, _plain(value)) for key, value in part.items() if not isinstance(value, dict)])]
    for key, value in part.items():
        if isinstance(value, dict) and value:
            sections += _sections(f"{name} {key}", value)
    return sections


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_plain(each) for each in value)
    return words.MISSING if value in (None, "") else str(value)


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
