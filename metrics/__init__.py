"""Confusion matrix, and the metrics of old, new and all classes computed from it."""
