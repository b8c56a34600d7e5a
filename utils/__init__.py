"""The lowest floor: losses, files, processes, logging, drawing; imports nothing from the other packages."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
