"""Transfer syntaxes that this site takes from a PACS: those that it can read, and no video."""

from __future__ import annotations

from fedward_client.dicom.syntaxes import NATIVE_SYNTAXES, PLUGIN_OF_SYNTAX

TRANSFER_SYNTAXES: tuple[str, ...] = (*sorted(map(str, NATIVE_SYNTAXES)), *map(str, PLUGIN_OF_SYNTAX))
"""Uncompressed ones first: a peer that must choose takes what it has without converting."""
