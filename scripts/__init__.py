"""Experiments and project checks."""
