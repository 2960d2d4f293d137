"""Holds the imports to the map in docs/architecture.md: they go downward only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cspnet"
# Rooms by height; a module may import what stands lower, and its neighbours of the same room.
HEIGHTS = [
    ["display", "shell"],
    ["aliases"],
    ["errors", "console"],
    ["schema"],
    ["recipe"],
    ["nets", "data"],
    ["train.world"],
    ["train.runtime", "train.lock", "train.optim", "train.adversarial"],
    ["train.checkpoint"],
    ["train.state"],
    ["train.health"],
    ["weights"],
    ["trained"],
    ["train.job", "evaluate", "predict", "export"],
    ["train.step", "train.fast", "train.saved"],
    ["train.forecast"],
    ["report"],
    ["train.loop"],
    ["train.plan"],
    ["cli"],
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room(module: str) -> str:
    """The entry of HEIGHTS for a dotted module name below cspnet."""
    for rooms in HEIGHTS:
        for name in rooms:
            if module == name or module.startswith(f"{name}."):
                return name
    raise AssertionError(f"{module} stands in no room: give it a place in HEIGHTS and in the map")


def height(name: str) -> int:
    return next(level for level, rooms in enumerate(HEIGHTS) if name in rooms)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules below cspnet that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "cspnet":
                names.update(f"cspnet.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return {name.removeprefix("cspnet.") for name in names if name.startswith("cspnet.")}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_downward(path):
    here = room(dotted(path))
    for module in imported(path):
        there = room(module)
        assert there == here or height(there) < height(here), f"{dotted(path)} imports {module}"


def test_data_and_nets_know_nothing_of_each_other():
    for path in MODULES:
        here = room(dotted(path))
        if here in ("nets", "data"):
            others = {room(module) for module in imported(path)} - {
                here,
                "display",
                "errors",
                "shell",
                "schema",
                "recipe",
            }
            assert not others, f"{dotted(path)} imports {others}"


def test_recipe_and_cli_need_no_torch_at_import():
    names = ("recipe.py", "schema.py", "errors.py", "__init__.py")
    for name in (*(PACKAGE / name for name in names), *(PACKAGE / "cli").glob("*.py")):
        tree = ast.parse(name.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(node) for node in top), name


def test_map_names_every_module():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for path in MODULES:
        assert path.name in text, f"docs/architecture.md does not mention {dotted(path)}"
