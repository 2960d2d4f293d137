"""What test modules share is in modules of its own, so that each can run and change alone."""

import ast
from pathlib import Path


def test_no_test_imports_another_test():
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            tests = [name for name in names if name.startswith("tests.test_")]
            assert not tests, f"{path.name} imports {tests[0]}: move it to tests/helpers.py"
