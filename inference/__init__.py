"""From a checkpoint alone: load it, predict images at several scales, show features."""
