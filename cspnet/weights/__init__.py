"""Readers of a trained net, one module per kind of file; `cspnet/weights/load.py` is their front."""
