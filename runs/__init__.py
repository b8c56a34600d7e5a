"""The files of a run; each module writes and reads one format."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
