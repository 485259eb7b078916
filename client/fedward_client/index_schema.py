"""The tables of the index. What is seldom asked for lies apart from what every opening of a cohort reads."""

from __future__ import annotations

from fedward_client.index_records import INTEGERS, REALS, ContentRecord

SCHEMA_VERSION = "4"
"""Grows when columns change, when a rule refuses what it used to accept, or when more is kept."""


def _declared(name: str) -> str:
    return f"{name} {'INTEGER' if name in INTEGERS else 'REAL' if name in REALS else 'TEXT'}"


SCHEMA = f"""
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS files (
    name BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    content TEXT              -- SHA-256; NULL when the file could not be read
) STRICT;
CREATE INDEX IF NOT EXISTS files_by_content ON files (content);
CREATE TABLE IF NOT EXISTS signs (id INTEGER PRIMARY KEY, facts TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE IF NOT EXISTS contents (
    content TEXT PRIMARY KEY, {", ".join(map(_declared, ContentRecord._fields))},
    signs_id INTEGER
) STRICT;
CREATE INDEX IF NOT EXISTS refused_images ON contents (reason) WHERE reason NOT NULL;
CREATE INDEX IF NOT EXISTS refused_radiographs ON contents (radiograph_reason)
    WHERE radiograph_reason NOT NULL;
CREATE INDEX IF NOT EXISTS images_by_series ON contents (series) WHERE reason IS NULL;
CREATE INDEX IF NOT EXISTS images_of_acquisitions ON contents (study)
    WHERE images_in_acquisition NOT NULL;
CREATE TABLE IF NOT EXISTS arriving (series TEXT PRIMARY KEY, kind TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS slices (content TEXT PRIMARY KEY, facts TEXT NOT NULL) STRICT;
"""
TABLES = ("files", "contents", "slices", "signs", "arriving")
