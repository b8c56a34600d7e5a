"""What is fast, and how we know: ``python -m benchmarks.losses`` and its neighbours."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
