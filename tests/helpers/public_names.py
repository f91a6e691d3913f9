"""Where each public name lives, read from the stub that is the one list of them."""

import ast
import functools
from pathlib import Path

import bayes_klrl

STUB = Path(bayes_klrl.__file__).with_suffix(".pyi")


@functools.cache
def homes() -> dict[str, str]:
    """{public name: its module}."""
    found = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, f"write `import {alias.name} as {alias.name}`"
                assert alias.name not in found, f"{alias.name} is listed twice"
                found[alias.name] = f"bayes_klrl.{node.module}"
    return found
