"""Loss functions, checkpoints, processes, logs and pictures."""
