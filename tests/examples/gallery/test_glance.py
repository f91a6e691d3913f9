"""The table "At a glance": every example declares its row, and the verdicts on the site are supported by its numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.gallery.glance import Glance, glance_of
from bayes_klrl.gallery.index import ROOMS, at_a_glance, examples

FINDINGS = json.loads((Path(__file__).parents[3] / "docs" / "gallery" / "findings.json").read_text(encoding="utf-8"))
GLANCE = Glance(
    job="j",
    today="t",
    adds="a",
    verdict="yes",
    measured="{a: b, 0.5:.1f} and {1 nat:+.0%}.",
    claims=(("a: b, 0.5", "1 nat"), ("a: b, 0.5", 0.0, "se")),
    picture="p",
    setting="s",
)


@pytest.mark.parametrize("name", examples())
def test_an_example_declares_its_row(name: str) -> None:
    glance = glance_of(examples()[name])
    assert glance.claims
    assert all((glance.job, glance.today, glance.adds, glance.measured, glance.picture))
    assert glance.setting.startswith(("Model: ", "No network: "))
    assert re.search(r"\d", glance.setting)  # how large the model and the data are
    assert max(len(words.split()) for words in (glance.job, glance.today, glance.adds)) <= 12
    assert len(glance.helped(dict.fromkeys(glance.names, 0.5)).split()) <= 55


@pytest.mark.parametrize("name", FINDINGS)
def test_the_verdict_on_the_site_is_what_was_measured(name: str) -> None:
    glance, numbers = glance_of(examples()[name]), FINDINGS[name]["numbers"]
    assert glance.names - numbers.keys() == set()
    assert glance.helped(numbers).startswith(f"{glance.verdict.capitalize()}. ")


def test_a_verdict_stands_only_if_its_claims_do() -> None:
    numbers = {"a: b, 0.5": 2.0, "1 nat": 1.0, "se": 0.9}
    assert GLANCE.names == set(numbers)
    assert GLANCE.helped(numbers) == "Yes. 2.0 and +100%."
    assert GLANCE.helped(numbers | {"se": 1.1}) == "Not in this run. 2.0 and +100%."
    assert GLANCE.helped(numbers | {"1 nat": 2.0}).startswith("Not in this run. ")
    assert GLANCE.helped({"1 nat": 1.0}).startswith("run again")
    assert GLANCE.helped(None) == "not run"
    assert replace(GLANCE, verdict="partly").helped(numbers).startswith("Partly. ")


def test_rows_stand_room_by_room() -> None:
    rows = at_a_glance({})
    assert sorted(row.name for row in rows) == sorted(examples())
    assert [row.room for row in rows] == sorted((row.room for row in rows), key=list(ROOMS).index)
    assert {row.helped for row in rows} == {"not run"}


def test_an_example_without_a_row_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("GLANCE: dict = {}\nOTHER = print('no')\n")
    with pytest.raises(BayesKLRLError, match=r"x.py has no row.*Declare GLANCE"):
        glance_of(file)
