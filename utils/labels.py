"""Mask values other than class ids."""

VOID = 255  # of pixels that belong to no class
