"""Data sets before a run: download, check, pack."""
