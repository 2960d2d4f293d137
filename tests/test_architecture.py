"""Imports between packages go in one direction: the order of docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cspnet"
# A module may import from packages above its own, and from its own package.
ORDER = [
    "text",
    "shell",
    "errors",
    "files",
    "console",
    "recipe",
    "runtime",
    "images",
    "nets",
    "sources",
    "data",
    "run",
    "weights",
    "inference",
    "datasets",
    "report",
    "train",
    "plan",
    "cli",
]
# Packages that know nothing of each other, although the order would allow it.
INDEPENDENT = [("images", "nets"), ("nets", "sources"), ("nets", "data")]
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ORDER
)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def package(module: str) -> str:
    return module.partition(".")[0]


def imported_modules(path: Path) -> set[str]:
    """Modules below cspnet that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            if node.module == "cspnet":
                names.update(f"cspnet.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    names = {name.removeprefix("cspnet.") for name in names if name.startswith("cspnet.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_downward(path):
    own = package(dotted(path))
    for module in imported_modules(path):
        other = package(module)
        assert own == other or ORDER.index(other) < ORDER.index(own), f"{own} imports {module}"


def test_every_module_belongs_to_a_package_of_the_order():
    top_level = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert top_level | folders == set(ORDER)


@pytest.mark.parametrize("pair", INDEPENDENT, ids="-".join)
def test_independent_packages_do_not_import_each_other(pair):
    for path in MODULES:
        own = package(dotted(path))
        if own in pair:
            others = {package(module) for module in imported_modules(path)} - {own}
            assert not others & set(pair), dotted(path)


def test_recipe_and_command_line_import_no_torch():
    """`cspnet --help` and errors in a recipe do not wait for torch."""
    names = ("errors.py", "__init__.py")
    for path in (
        *(PACKAGE / name for name in names),
        *(PACKAGE / "recipe").glob("*.py"),
        *(PACKAGE / "cli").glob("*.py"),
    ):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(node) for node in top), path


def defined_names(node: ast.stmt) -> list[str]:
    """Public names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = [node.name]
    elif isinstance(node, ast.Assign):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        names = [node.target.id]
    else:
        names = []
    return [name for name in names if name[0] != "_"]


def test_public_names_are_defined_once():
    """A name means one thing in the whole package; no import needs an alias to avoid a clash."""
    definitions: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for name in defined_names(node):
                definitions.setdefault(name, []).append(dotted(path))
    twice = {name: places for name, places in definitions.items() if len(places) > 1}
    assert not twice


def test_map_names_every_package():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for name in ORDER:
        assert f"`{name}" in text, f"docs/architecture.md does not mention {name}"


def test_no_import_needs_an_alias():
    """Names are unique in the package, so that imports of it never rename them."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cspnet"):
                renamed = [alias.name for alias in node.names if alias.asname]
                assert not renamed, f"{dotted(path)} renames {renamed}"
