"""The gallery's index: every example is listed and linked, and a page says what each found."""

from __future__ import annotations

import importlib
import inspect
import re
from html import escape, unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bayes_klrl.cli import app
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import glance_of
from bayes_klrl.gallery.index import examples, title_of
from bayes_klrl.gallery.page import write_index

ROOT = Path(__file__).parents[3]


def rows_of(page: str) -> dict[str, list[str]]:
    """The texts of the cells of the table, by the name of the example, which is the first word of a row."""
    cells = [re.findall(r"<t[hd] (?:scope=\"row\"|data-)[^>]*>(.*?)</t[hd]>", row) for row in page.split("<tr>")[2:]]
    texts = [[unescape(re.sub("<[^>]*>", " ", cell)).strip() for cell in row] for row in cells]
    return {row[0].split()[0]: row for row in texts}


def left_by(name: str, out: Path, numbers: dict[str, float]) -> None:
    """What an example leaves."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "shown.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "report.html").write_text("report")
    Finding(folder / "report.html", folder / "shown.png", f"{name} < all", "slow", numbers).save(seconds=12.34)


def test_examples_are_listed_and_others_refused(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["gallery"])
    assert listed.exit_code == 0
    lines = listed.output.replace("\n", " ")
    for name, file in examples().items():
        assert name in lines
        assert title_of(file).split(":")[0] in lines
    wrong = CliRunner().invoke(app, ["gallery", "nothing", "--out", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "There is no example 'nothing'" in wrong.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_all_goes_on_past_an_example_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(name: str, out: Path, *, seed: int) -> Finding:
        assert seed == 3
        if name == "explain":
            raise BayesKLRLError("needs a package")
        left_by(name, out, {})
        return Finding(out / name / "report.html", out / name / "shown.png", "all", "none", {})

    monkeypatch.setattr("bayes_klrl.gallery.index.run_example", run)
    told = CliRunner().invoke(app, ["gallery", "all", "--seed", "3", "--out", str(tmp_path)])
    said = told.output.replace("\n", " ")
    assert told.exit_code == 1
    assert "explain was left out: needs a package" in said
    assert "These examples could not be run, for the reasons above: explain." in said
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert [f'href="{name}/report.html"' in page for name in examples()] == [name != "explain" for name in examples()]
    assert rows_of(page)["explain"][-1] == "not run"
    alone = CliRunner().invoke(app, ["gallery", "explain", "--seed", "3", "--out", str(tmp_path)])
    assert alone.exit_code == 1
    assert "needs a package" in alone.output


def test_each_example_is_linked_and_has_the_same_door() -> None:
    links = {path.stem: path for path in (ROOT / "examples" / "gallery").glob("*.py")}
    assert set(links) == set(examples())
    for name, file in examples().items():
        assert links[name].resolve() == file.resolve() or not links[name].is_symlink()  # Windows, zip downloads
        main = importlib.import_module(f"bayes_klrl.gallery.{file.parent.name}.{name}").main
        assert list(inspect.signature(main).parameters)[:2] == ["out", "seed"]


def test_the_page_says_what_each_found(tmp_path: Path) -> None:
    names = list(examples())
    for name in names:
        left_by(name, tmp_path, {"KL (nats)": 0.5})
        assert Finding.load(tmp_path / name)["numbers"] == {"KL (nats)": 0.5}
    page = write_index(names, tmp_path).read_text(encoding="utf-8")
    for name in names:
        assert f'href="{name}/report.html"' in page
        assert f"{name} &lt; all" in page
        assert escape(glance_of(examples()[name]).setting) in page
    with pytest.raises(BayesKLRLError, match=r"finding.json.*Run the example again"):
        write_index(names, tmp_path / "elsewhere")


def test_the_table_has_a_row_for_every_example_with_the_numbers_of_its_run(tmp_path: Path) -> None:
    numbers = {"walks": 30.0, "DQN, KL to the posterior (nats)": 0.25}
    numbers |= {
        f"soft {name}, KL to the posterior (nats)": value for name, value in (("SARSA", 0.5), ("Q-learning", 0.75))
    }
    left_by("soft_values", tmp_path, numbers)
    left_by("explain", tmp_path, {"another": 1.0})
    page = write_index(["soft_values", "explain"], tmp_path).read_text(encoding="utf-8")
    rows = rows_of(page)
    assert set(rows) == set(examples())
    assert {len(row) for row in rows.values()} == {4}
    for said in ("Partly.", "DQN is 0.250 nats", "after 30 walks", "soft SARSA 0.50, soft Q-learning 0.75"):
        assert said in rows["soft_values"][-1]
    assert rows["explain"][-1].startswith("run again")
    assert {row[-1] for name, row in rows.items() if name not in {"soft_values", "explain"}} == {"not run"}
    assert f"Of {len(rows)} examples: partly in 1, run again in 1, not run in {len(rows) - 2}." in page


def test_links_of_the_page_lead_somewhere(tmp_path: Path) -> None:
    left_by("soft_values", tmp_path, {})
    left_by("generation", tmp_path, {})
    page = write_index(["generation", "soft_values"], tmp_path).read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"]+)"', page)) - {"data:,"}
    assert {"#generation", "#soft_values", "generation/report.html", "soft_values/report.html"} <= links
    for link in links:
        assert f'id="{link[1:]}"' in page if link.startswith("#") else (tmp_path / link).is_file(), link
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page)
    assert [heading.split(":")[0] for heading in headings] == [
        "What this is",
        "At a glance",
        "Language",
        "Generation",
        "Decisions",
        title_of(examples()["soft_values"]).split(":")[0],
    ]
