"""What one sees of a run: the record, the progress, the pictures."""
