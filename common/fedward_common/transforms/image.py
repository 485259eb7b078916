"""Pictures of any kind in grey: one channel, resized to the plan's size, intensity from -1 to 1.

What of a file is black and what white is decided before, by the plan's window, and colour has become
grey. From there on a picture is treated as a radiograph is.
"""

from __future__ import annotations

from fedward_common.transforms import Transform, chest_xray

TRANSFORM = Transform(name="image", channels=1, preprocess=chest_xray.preprocess, augment=chest_xray.augment)
