"""Readers of a trained net, one module per kind of file; `cspnet/trained.py` is their front."""
