"""Where images come from. A source finds files and yields their bytes, nothing more."""
