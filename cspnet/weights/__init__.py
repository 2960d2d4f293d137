"""Trained networks in files: one reader per format, behind `cspnet.weights.load.load_weights`."""
