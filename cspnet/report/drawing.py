"""Matplotlib figures in the report's theme, saved as PNG, or as SVG to inline in an HTML page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from cspnet.files import replace_file
from cspnet.report.style import LIGHT
from cspnet.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

PNG_DPI = 150
SERIES = ("c0", "c1", "c2")  # colour names of the first, second and third curve
THEME: "dict[RcKeyType, Any]" = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["dim"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": LIGHT["dim"],
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": LIGHT["paper"],
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.size": 9,
    "grid.color": LIGHT["line"],
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": LIGHT["ink"],
    # Names of classes and runs may contain dollar signs; no text of the report is a formula.
    "text.parse_math": False,
    "xtick.color": LIGHT["dim"],
    "xtick.labelsize": 9,
    "ytick.color": LIGHT["dim"],
    "ytick.labelsize": 9,
    # Text stays text: selectable, small, in the font of the page.
    "svg.fonttype": "none",
}

_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_FONT = re.compile(r"font: (\S+) [^;]*(;|$)")
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


@dataclass(frozen=True)
class Drawing:
    """A figure with its texts for the page and for screen readers."""

    name: str  # of its PNG file without the suffix; unique on a page
    figure: "Figure"
    title: str
    description: str
    note: str = ""  # caption below the figure
    # Hover texts by gid of an artist: one for the artist, or one for each marker of a line.
    tooltips: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def _theme() -> Iterator[None]:
    """Apply the report's theme, regardless of matplotlibrc."""
    import matplotlib  # takes a second to import

    with matplotlib.rc_context(), warnings.catch_warnings():
        # matplotlib's font lacks many scripts. It draws boxes and warns once per character.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        warnings.filterwarnings("ignore", message="(?s)constrained_layout not applied")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(THEME)
        yield


@contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure of this size in inches; artists added within the context have the theme."""
    from matplotlib.figure import Figure

    with _theme():
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", path: Path) -> None:
    """Saves a figure as PNG, atomically. Raises OSError."""
    with _theme():
        replace_file(path, lambda file: figure.savefig(file, dpi=PNG_DPI, format="png"))


def to_svg(drawing: Drawing) -> str:
    """The drawing as an <svg> element for an HTML page: deterministic, without external resources.

    Its ids depend on the name of the drawing, so that they are unique on a page. Colours of the
    theme become CSS variables, so that the page's dark mode applies to it. It has a title and a
    description for screen readers.
    """
    import matplotlib

    buffer = io.BytesIO()
    with _theme():
        matplotlib.rcParams["svg.hashsalt"] = drawing.name
        drawing.figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue().decode())
    for element in root.iter():
        _clean(element)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("style", "metadata")]:
            parent.remove(child)
    for gid, texts in drawing.tooltips.items():
        _add_tooltips(root, gid, texts)
    for group in root.iter("g"):
        group.attrib.pop("id", None)  # "axes_1": on each figure of the page
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{drawing.name}-title {drawing.name}-description",
        "stroke-linejoin": "round",
    }
    for tag, key, text in (
        ("desc", "description", drawing.description),
        ("title", "title", drawing.title),
    ):
        element = Element(tag, {"id": f"{drawing.name}-{key}"})
        element.text = printable(text)
        root.insert(0, element)
    # With end tags for all elements: an HTML parser does not need to know SVG's empty ones.
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _clean(element: Element) -> None:
    """Drops namespaces, indentation and excess digits; replaces the theme's colours."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {}
    for name, value in element.attrib.items():
        if name == "style":
            value = _FONT_FAMILY.sub("", _FONT.sub(r"font-size: \1\2", value)).rstrip("; ")
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, variable)
        elif name in ("d", "x", "y", "width", "height", "transform"):
            value = " ".join(_NUMBER.sub(_shorten_number, value).split())
        if name == "transform" and value.startswith("rotate(-0 "):
            continue
        attributes[name.rpartition("}")[2]] = value
    element.attrib = attributes
    if element.text and not element.text.strip():
        element.text = None
    element.tail = None


def _shorten_number(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _add_tooltips(root: Element, gid: str, texts: list[str]) -> None:
    group = next((element for element in root.iter("g") if element.get("id") == gid), None)
    if group is None:
        return
    markers = list(group.iter("use"))
    targets = markers if len(texts) > 1 or len(markers) == 1 else [group]
    for target, text in zip(targets, texts, strict=True):
        title = Element("title")
        title.text = printable(text)
        target.insert(0, title)
