"""The documents' quotes of messages are those of the source."""

import ast
import importlib
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


def paragraphs():
    """Texts for users by paragraph: documents, headers of recipes, docstrings, the Makefile."""
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "data" / "README.md"]
    files += [path for path in (ROOT / "docs").glob("*.md") if path.name != "results.md"]
    files += [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "cspnet").rglob("*.py")]
    for path in files:
        for paragraph in re.split(r"\n(?:#?\s*\n)+", path.read_text()):
            yield path, paragraph


def test_examples_use_the_recipe_whose_accuracy_is_published():
    """cspdarknet53 has 8,000,000 steps: where it is named, its predicted duration is beside it."""
    card = re.compile(
        r"(?:--recipe|-r|-c)[ =]cspdarknet53(?:\.yaml)?(?![-\w.])|runs/cspdarknet53(?![-\w])"
    )
    listed = {"README.md", "recipes.md", "cspdarknet53.yaml"}
    for path, paragraph in paragraphs():
        if card.search(paragraph):
            assert path.name in listed, f"{path.name}: {paragraph}"
            header = path.suffix == ".yaml" or "predict" in paragraph
            assert header and "32 to 42 days" in path.read_text(), paragraph
    assert "cspnet-train --recipe cspdarknet53.yaml" in (ROOT / "README.md").read_text()


def documents():
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md")
    yield from (ROOT / "docs").glob("*.md")


def test_documented_imports_exist():
    imports = [
        match.groups()
        for path in documents()
        for match in re.finditer(
            r"^ *from (cspnet[\w.]*) import ([\w, ]+)$", path.read_text(), re.M
        )
    ]
    assert len(imports) >= 5
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_documented_source_files_exist():
    for path in documents():
        for name in re.findall(r"\b(?:cspnet|tests|benchmarks)/[\w/]+\.py\b", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


def test_the_predicted_duration_is_the_forecast():
    from cspnet.plan.forecast import find_card, forecast
    from cspnet.recipe import load as recipes

    def days(name):
        recipe = recipes.load_recipe(recipes.find_recipe(name), [])
        return [round(s / 86400) for s in forecast(recipe, find_card("rtx2070"), 1000).seconds]

    assert days("cspdarknet53") == [32, 42] and days("cspdarknet53-omega") == [5, 6]


def test_the_systemd_unit_knows_our_exit_codes():
    import configparser
    import shlex

    from cspnet.errors import CspnetError, RecipeError, StoppedError
    from cspnet.recipe import load as recipes

    text = (ROOT / "docs" / "resuming.md").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(re.search(r"^```ini\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1])
    service = unit["Service"]
    assert service["RestartForceExitStatus"] == str(StoppedError.exit_code)
    assert service["SuccessExitStatus"] == str(StoppedError.exit_code)
    never = {CspnetError.exit_code, RecipeError.exit_code}
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == never
    words = shlex.split(service["ExecStart"])
    assert "--resume" in words and recipes.find_recipe(words[words.index("--recipe") + 1])
