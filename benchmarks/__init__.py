"""Benchmarks of losses, training steps, data loading and scaling: ``python -m benchmarks.<name>``."""

import os

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
# Else torch's profiler prints lines of its own.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
