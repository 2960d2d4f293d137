"""What a run will need: measured on this machine, or predicted for another card."""
