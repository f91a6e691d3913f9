"""Mutants of the table die: the tests bite. The table itself is checked with the quick tests, so that it cannot rot.

One mutant of each folder of the package is run here; `make mutants` runs them all, and the hosted CI calls it in a job of its
own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, Copy, killers_of, mutated_text, run_mutant
from tests.mutants.later import LATER
from tests.mutants.table import MUTANTS as FIRST
from tests.mutants.table import Mutant

MUTANTS = (*FIRST, *LATER)

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
FOLDERS = ("models", "inference", "analysis")  # folders of which one mutant runs here; `make mutants` runs all
TRIED_MUTANTS = tuple(next(each for each in MUTANTS if each.file.startswith(f"{folder}/")) for folder in FOLDERS)
EQUIVALENT = Mutant(
    "one that changes nothing that matters",
    "inference/mcmc/suffix_moves.py",
    "log_ratio + np.log(lengths) - np.log(new_lengths)",
    "log_ratio - np.log(new_lengths) + np.log(lengths)",
    ("tests/inference/mcmc/test_suffix_mh.py::test_cuts_are_uniform_below_their_limit",),
)


def test_names_tell_mutants_apart_and_each_has_a_killer() -> None:
    assert len(BY_NAME) == len(MUTANTS)
    assert all(mutant.killers for mutant in MUTANTS)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_text_is_there_once_and_what_replaces_it_is_python(name: str) -> None:
    compile(mutated_text(BY_NAME[name]), BY_NAME[name].file, "exec")


@pytest.mark.parametrize("killer", killers_of(MUTANTS))
def test_killers_are_there(killer: str) -> None:
    """Parameters are checked where the mutants run."""
    file, _, rest = killer.partition("::")
    function = rest.partition("[")[0]
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert len([node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]) == 1


@pytest.mark.parametrize("text", ["nowhere in this file", "self.log_evidence"])
def test_a_text_that_is_not_there_once_is_an_error(text: str) -> None:
    mutant = replace(BY_NAME["psi forgotten in the weights after resampling"], text=text)
    with pytest.raises(ValueError, match=r"times in inference/smc/population\.py, not once"):
        mutated_text(mutant)


def test_a_mutant_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="changes nothing"):
        mutated_text(replace(EQUIVALENT, replacement=EQUIVALENT.text))


# --- the runs themselves


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """A copy in which the killers pass before anything is mutated."""
    made = Copy(tmp_path_factory.mktemp("mutants"))
    verdicts = made.verdicts([*killers_of(TRIED_MUTANTS), *EQUIVALENT.killers], keep_bytecode=True)
    assert {test: verdict for test, verdict in verdicts.items() if verdict != "passed"} == {}
    yield made
    made.close()
    differing = [
        path for path in (ROOT / "bayes_klrl").rglob("*.py") if "shipped" not in path.parts and differs(path, made)
    ]
    assert differing == []  # every mutation was taken back


def differs(path: Path, copy: Copy) -> bool:
    return path.read_bytes() != (copy.folder / path.relative_to(ROOT)).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [mutant.name for mutant in TRIED_MUTANTS])
def test_a_mutant_of_each_folder_dies(name: str, copy: Copy) -> None:
    assert run_mutant(BY_NAME[name], copy).survivors == {}


@pytest.mark.slow
def test_a_mutant_that_lives_is_seen_to_live(copy: Copy) -> None:
    assert run_mutant(EQUIVALENT, copy).survivors == dict.fromkeys(EQUIVALENT.killers, "passed")


@pytest.mark.slow
def test_what_breaks_is_not_killed(copy: Copy) -> None:
    """An exception other than an assertion is no verdict of a test; a module that cannot be imported is no run at all."""
    raising = replace(EQUIVALENT, text="    below = lengths if cut", replacement="    below = no_such_name if cut")
    assert set(run_mutant(raising, copy).survivors.values()) == {"NameError at call"}
    broken = replace(EQUIVALENT, text="__all__ = [", replacement="import no_such_module\n\n__all__ = [")
    with pytest.raises(RuntimeError, match="no_such_module"):
        run_mutant(broken, copy)
    missing = replace(EQUIVALENT, killers=("tests/inference/mcmc/test_suffix_mh.py::test_that_is_gone",))
    with pytest.raises(RuntimeError, match="not found"):
        run_mutant(missing, copy)
