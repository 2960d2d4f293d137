"""HTML fragments of the report."""

import html

from cspnet.report.drawing import Drawing, to_svg
from cspnet.text import printable


def escape(text: str) -> str:
    """Text as HTML; characters that are not printable are shown as escapes."""
    return html.escape(printable(text, keep="\n\t"))


def table(header: list[str], rows: list[list[str]], numeric: tuple[int, ...] = ()) -> str:
    """A table that scrolls if it is too wide. Cells are HTML; `numeric` columns align right."""
    starts = ["<td class=n>" if column in numeric else "<td>" for column in range(len(header))]
    body = "\n".join(
        "<tr>" + "".join(start + cell for start, cell in zip(starts, row, strict=True))
        for row in rows
    )
    headings = "".join(
        f"<th{' class=n' if column in numeric else ''}>{escape(title)}"
        for column, title in enumerate(header)
    )
    return f'<div class="scroll"><table><thead><tr>{headings}<tbody>\n{body}</table></div>'


def figure(drawing: Drawing, css_class: str = "chart") -> str:
    """A drawing as inline SVG with its note as caption."""
    caption = f"<figcaption>{escape(drawing.note)}</figcaption>" if drawing.note else ""
    return f'<figure class="{css_class}">{to_svg(drawing)}{caption}</figure>'
