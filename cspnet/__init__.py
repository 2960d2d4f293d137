"""cspnet trains CSPDarknet53, the backbone of YOLOv4, by a recipe, and hands on the result."""

from importlib.metadata import version

__version__ = version("cspnet")
__all__ = ["create"]


def __getattr__(name: str):
    # torch takes seconds to import; `cspnet --help` must not wait for it.
    if name == "create":
        from cspnet.nets import create

        return create
    raise AttributeError(f"module 'cspnet' has no attribute {name!r}")
