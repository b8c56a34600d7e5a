"""Benchmarks of losses, training steps, data loading and scaling: ``python -m benchmarks.<name>``."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
