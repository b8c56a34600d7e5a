"""What labels mean beside their classes."""

VOID = 255  # mask value of pixels that belong to no class
