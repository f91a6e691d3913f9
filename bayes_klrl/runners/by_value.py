"""Which functions are sent with their code: those of modules that another process would not find.

A posterior file of the command line is run by its path, and finds the modules beside it: while the file runs, its folder is
on `sys.path`, and later it is not. Functions of such a module are sent by value, those of an installed one by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["contents", "is_sent_by_value", "sent_by_value", "unfindable"]

_OF_THE_IMPORT = ("__builtins__", "__cached__", "__loader__", "__path__", "__spec__")


@contextmanager
def sent_by_value() -> Iterator[None]:
    """Let functions and classes of modules that cannot be found be pickled with their code."""
    import cloudpickle

    modules = [module for module in unfindable() if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def unfindable() -> list[ModuleType]:
    """Return the loaded top-level modules from files that no import would find now."""
    folders = {str(Path(entry or ".").resolve()) for entry in sys.path}
    found = []
    for name, module in list(sys.modules.items()):
        folder = None if "." in name or name.startswith("__") else _folder_of(module)
        if folder is None or name in sys.stdlib_module_names:
            continue
        if str(folder) not in folders and str(folder.resolve()) not in folders and not _is_found(name, module):
            found.append(module)
    return found


def _folder_of(module: ModuleType) -> Path | None:
    """Return the folder that a top-level module was found in; None for one that is no Python file and no package of such."""
    file = getattr(module, "__file__", None)
    if file is None:  # a package without __init__.py is several folders, perhaps
        folders = list(getattr(module, "__path__", ()))
        return Path(folders[0]).parent if folders else None
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    return Path(file).parent.parent if Path(file).name == "__init__.py" else Path(file).parent


def is_sent_by_value(module: ModuleType) -> bool:
    """Return whether a module, or a package that it is in, is registered to be sent with its code."""
    import cloudpickle

    registered = cloudpickle.list_registry_pickle_by_value()
    parts = module.__name__.split(".")
    return any(".".join(parts[: num + 1]) in registered for num in range(len(parts)))


def contents(module: ModuleType) -> dict[str, Any]:
    """Return what a module defines and imports, without what belongs to its import here."""
    return {name: value for name, value in vars(module).items() if name not in _OF_THE_IMPORT}


def _is_found(name: str, module: ModuleType) -> bool:
    """Return whether a finder, such as that of an editable installation, knows a module of this name and file."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = None if find_spec is None else find_spec(name, None)
        if spec is not None:
            return spec.origin is None or spec.origin == module.__file__
    return False
