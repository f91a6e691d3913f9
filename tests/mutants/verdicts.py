"""A pytest plugin of the mutants' runs: writes down how each test ended, and refuses to test another copy of the package."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import bayes_klrl

FOLDER, FILE = "BAYES_KLRL_MUTANT_FOLDER", "BAYES_KLRL_MUTANT_VERDICTS"

_verdicts: dict[str, str] = {}


def pytest_configure() -> None:
    expected, found = Path(os.environ[FOLDER]), Path(bayes_klrl.__file__)
    if not found.is_relative_to(expected):
        raise pytest.UsageError(f"The package was imported from {found}, not from the copy in {expected}.")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """ "passed", "failed" by an assertion in the test itself, or the name of whatever else was raised."""
    if call.excinfo is None:
        if call.when == "call":
            _verdicts[item.nodeid] = "passed"
    elif call.when == "call" and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception)):
        _verdicts[item.nodeid] = "failed"
    else:
        _verdicts[item.nodeid] = f"{call.excinfo.typename} at {call.when}"


def pytest_sessionfinish() -> None:
    Path(os.environ[FILE]).write_text(json.dumps(_verdicts))
