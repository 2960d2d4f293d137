"""The documents' quotes of messages are those of the source."""

import ast
import re

import pytest

from tests.conftest import ROOT


def templates() -> list[str]:
    """Every text in the source, with a NUL for each value that is filled in."""
    found = []
    for path in (ROOT / "cspnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(parts))
    return found


TEMPLATES = templates()
ROWS = re.findall(r"^\| (`[^|]+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


def quotes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("cell", ROWS)
def test_a_quoted_message_is_in_the_source(cell):
    for quote in quotes(cell):
        pieces = [re.escape(piece.strip()) for piece in quote.split("…") if piece.strip()]
        assert pieces, f"{cell} quotes nothing"
        pattern = re.compile(r"[^\n]*?".join(pieces))
        assert any(pattern.search(text) for text in TEMPLATES), f"nothing says {quote!r}"


def test_the_table_is_not_empty():
    assert len(ROWS) > 60
