"""What is fast, and how we know: ``python -m benchmarks.losses`` and its neighbours."""
