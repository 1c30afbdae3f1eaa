"""What transformers does not promise to keep has one place in the code."""

from __future__ import annotations

import ast
from pathlib import Path

import lazarus

PUBLIC = {"transformers", "transformers.pytorch_utils", "transformers.utils", "transformers.utils.hub"}
"""modules whose names the documentation of transformers has"""


def test_private_names_of_transformers_are_imported_in_one_module() -> None:
    source = Path(lazarus.__file__).parent
    imported = {
        (path.name, node.module, alias.name)
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
        for alias in node.names
    }
    private = {found for found in imported if found[1] not in PUBLIC or found[2].startswith("_")}
    assert {name for name, *_ in private} == {"_transformers.py"}
