"""The files of a run; each module writes and reads one format."""
