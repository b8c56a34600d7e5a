"""Experiments."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
