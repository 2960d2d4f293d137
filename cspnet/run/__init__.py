"""The files of a run: their names and formats, written and read here only."""
