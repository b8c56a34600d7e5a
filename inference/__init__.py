"""Inference from a checkpoint: loading, multi-scale prediction, prediction of image files, t-SNE."""
