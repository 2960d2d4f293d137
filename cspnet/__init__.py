"""Train CSPDarknet53, the backbone of YOLOv4, from a recipe; evaluate and export it."""

from importlib.metadata import PackageNotFoundError, version

import cspnet.images  # noqa: F401  sets the limit of OpenCV, before any module loads OpenCV

try:
    __version__ = version("cspnet")
except PackageNotFoundError:  # run from a clone that was not installed
    __version__ = "0+unknown"
__all__ = ["create", "load"]


def __getattr__(name: str):
    # torch takes seconds to import; `cspnet --help` must not wait for it.
    if name == "create":
        from cspnet.nets import create

        return create
    if name == "load":
        from cspnet.weights.load import load_network

        return load_network
    raise AttributeError(f"module 'cspnet' has no attribute {name!r}")
