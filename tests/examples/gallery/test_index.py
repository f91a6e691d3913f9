"""The gallery's index: every example is listed and linked, and a page says what each found."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bayes_klrl.cli import app
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.index import examples, title_of, write_index

ROOT = Path(__file__).parents[3]


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
        folder = out / name
        folder.mkdir(parents=True)
        (folder / "shown.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        finding = Finding(folder / "report.html", folder / "shown.png", "all", "none", {})
        finding.save(seconds=1.0)
        return finding

    monkeypatch.setattr("bayes_klrl.gallery.index.run_example", run)
    told = CliRunner().invoke(app, ["gallery", "all", "--seed", "3", "--out", str(tmp_path)])
    said = told.output.replace("\n", " ")
    assert told.exit_code == 1
    assert "explain was left out: needs a package" in said
    assert "These examples could not be run, for the reasons above: explain." in said
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert [f'href="{name}/report.html"' in page for name in examples()] == [name != "explain" for name in examples()]
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


def test_the_index_says_what_each_found(tmp_path: Path) -> None:
    names = list(examples())
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "shown.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        finding = Finding(folder / "report.html", folder / "shown.png", f"{name} < all", "slow", {"KL (nats)": 0.5})
        finding.save(seconds=12.34)
        assert Finding.load(folder)["numbers"] == {"KL (nats)": 0.5}
    page = write_index(names, tmp_path).read_text(encoding="utf-8")
    for name in names:
        assert f'href="{name}/report.html"' in page
        assert f"{name} &lt; all" in page
    with pytest.raises(BayesKLRLError, match=r"finding.json.*Run the example again"):
        write_index(names, tmp_path / "elsewhere")
