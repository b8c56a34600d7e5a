"""From predictions to the published numbers: confusion matrix, then old, new and all classes."""
