"""Training: device and precision, optimizer and schedule, checkpoints, the loop."""
