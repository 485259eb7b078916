"""Draw a chest that nobody has: body, lungs, heart, spine, ribs, noise, and sometimes a lesion.

For demonstrations and tests where no real radiographs are at hand. Anatomy, exposure and the lesion's
place vary, so that a network must find the lesion and cannot go by brightness alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PHANTOM_WINDOW = (1800, 3000)
"""WindowCenter and WindowWidth for MONOCHROME2 pixels."""

Field = NDArray[np.float64]


def draw_phantom(
    size: int, lesion: bool, generator: np.random.Generator, *, exposure: float, contrast: float
) -> NDArray[np.uint16]:
    """Draw one frontal view; dense tissue is bright.

    Args:
        size: rows and columns.
        lesion: whether to place a soft round opacity in one lung.
        generator: source of all variation.
        exposure: added to every pixel, in stored units (about -150..150).
        contrast: factor around mid-grey (about 0.9..1.1).

    Returns:
        uint16 `(size, size)`, 12 bits used.
    """
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    x = x + generator.normal(0, 0.02)
    y = y + generator.normal(0, 0.02)
    lung_x, lung_width = generator.uniform(0.38, 0.44), generator.uniform(0.26, 0.31)
    lung_height = generator.uniform(0.58, 0.68)
    lungs = np.maximum(
        _ellipse(x + lung_x, y, lung_width, lung_height), _ellipse(x - lung_x, y, lung_width, lung_height)
    )
    density = 1500.0 * _ellipse(x, y, 0.95, 1.1) + 400.0
    density -= 900.0 * lungs
    density += 550.0 * _ellipse(x - 0.14, y - 0.25, generator.uniform(0.26, 0.34), 0.34)  # heart
    density += 500.0 * np.exp(-((x / 0.07) ** 2))  # spine
    density += _ribs(x, y, generator)
    if lesion:
        density += _lesion(x, y, lung_x, lung_width, lung_height, generator)
    density += generator.normal(0, 60.0, density.shape)
    shown = (density - 1500.0) * contrast + 1500.0 + exposure + generator.normal(0, 60.0)
    return np.clip(np.rint(shown), 0, 4095).astype(np.uint16)


def _ellipse(x: Field, y: Field, width: float, height: float) -> Field:
    """1 inside, 0 outside, with a soft edge."""
    distance = np.sqrt((x / width) ** 2 + (y / height) ** 2)
    edge: Field = 1.0 / (1.0 + np.exp((distance - 1.0) * 20.0))
    return edge


def _ribs(x: Field, y: Field, generator: np.random.Generator) -> Field:
    shift = generator.uniform(0, 0.2)
    wave: Field = np.cos((y + 0.45 * x**2 + shift) * 2 * np.pi / 0.24)
    return 140.0 * np.maximum(wave, 0.0) ** 2 * _ellipse(x, y, 0.85, 0.85)


def _lesion(
    x: Field, y: Field, lung_x: float, lung_width: float, lung_height: float, generator: np.random.Generator
) -> Field:
    side = generator.choice((-1.0, 1.0))
    center_x = side * lung_x + generator.uniform(-0.5, 0.5) * lung_width
    center_y = generator.uniform(-0.6, 0.6) * lung_height
    radius = generator.uniform(0.09, 0.15)
    blob: Field = np.exp(-((x - center_x) ** 2 + (y - center_y) ** 2) / (2 * radius**2))
    return generator.uniform(550.0, 800.0) * blob
