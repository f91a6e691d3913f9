"""The documentation site, without building it: pages that compile, names that exist, and the scripts beside them.

`make docs` builds the site and runs its notebooks; what is here needs neither Sphinx nor a model. Read `test_pages` first.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(path: str) -> ModuleType:
    """Return a Python file of the site as a module, such as "check_site" or "_ext/gallery_text"."""
    file = DOCS / f"{path}.py"
    name = f"docs_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
