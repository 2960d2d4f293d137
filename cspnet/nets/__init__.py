"""The networks. `create(name)` builds one with timm's parameter names and Darknet's numerics."""

from cspnet.nets.csp import create

__all__ = ["create"]
