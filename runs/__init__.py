"""The files of a run: each format has one owner, its writer beside its reader."""
