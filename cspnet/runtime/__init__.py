"""Where a run executes: processes, device, precision, signals."""
