"""Inference from a checkpoint: loading, multi-scale prediction, prediction of image files, t-SNE."""

from utils.command import interrupts_in_one_line

interrupts_in_one_line()
