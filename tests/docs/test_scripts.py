"""The scripts of the site: what checks it, what collects the gallery, and how docstrings and sections are written for it."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from bayes_klrl.gallery.glance import glance_of
from bayes_klrl.gallery.index import examples
from bayes_klrl.gallery.page import write_index
from tests.docs import DOCS, ROOT, script

CHECK = script("check_site")
GALLERY = script("_ext/gallery_text")
DOCSTRINGS = script("_ext/docstrings")
LABELS = script("_ext/theory_labels")

LINK = re.compile(r"\[([^\]]*)\]\(#[^)]*\):?")

GOOD = '<h1 id="top">x</h1><a href="b.html#there">b</a><a href="https://example.org">e</a><img src="p.png">'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="a.html#top">a</a><a href="#there">here</a>')
    (tmp_path / "p.png").write_bytes(b"")
    (tmp_path / "s.css").write_text("p { background: url(p.png) }")
    return tmp_path


def test_a_whole_site_has_no_mistakes(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CHECK.main(site) == 0
    assert (site / "external.txt").read_text() == "https://example.org\n"
    assert "2 pages" in capsys.readouterr().out


@pytest.mark.parametrize(
    "html, mistake",
    [
        ('<a href="nowhere.html">', "leads to no file"),
        ('<a href="b.html#nowhere">', "leads to no anchor"),
        ('<a href="#nowhere">', "leads to no anchor"),
        ('<img src="nowhere.png">', "leads to no file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "would load"),
        ('<link rel="stylesheet" href="//cdn.example.org/x.css">', "would load"),
    ],
)
def test_a_mistake_is_found(site: Path, html: str, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "c.html").write_text(html)
    assert CHECK.main(site) == 1
    assert mistake in capsys.readouterr().out


def test_styles_that_load_from_the_network_are_found(site: Path) -> None:
    (site / "s.css").write_text("@import 'https://fonts.example.org/f.css'; p { background: url(//example.org/p.png) }")
    assert len(CHECK.check(site)[0]) == 2


def test_an_empty_site_is_a_mistake(tmp_path: Path) -> None:
    assert CHECK.main(tmp_path) == 1


def finding(folder: Path, name: str) -> None:
    """What an example leaves, with a picture that does not compress."""
    from PIL import Image

    (folder / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 1100, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(folder / name / "noise.png")
    found = {"better": "b_1 < 2", "worse": "w*", "numbers": {"n": 1.5}, "picture": "noise.png", "report": "report.html"}
    (folder / name / "finding.json").write_text(json.dumps(found | {"seconds": 61.2}))


def test_findings_are_collected_with_small_pictures(tmp_path: Path) -> None:
    collect = script("collect_gallery")
    out, site = tmp_path / "out", tmp_path / "site"
    out.mkdir()
    site.mkdir()
    finding(out, "soft_values")
    finding(out, "not_an_example")
    (site / "findings.json").write_text('{"gone": {"room": "language"}}')
    assert collect.collect(out, site) == ["soft_values"]
    kept = json.loads((site / "findings.json").read_text())
    assert set(kept) == {"soft_values"}
    assert kept["soft_values"]["numbers"] == {"n": 1.5}
    assert kept["soft_values"]["source"] == "bayes_klrl/gallery/decisions/soft_values.py"
    picture = (site / "soft_values.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) <= 40_000


def test_small_pictures_keep_the_colours_of_plots_apart(tmp_path: Path) -> None:
    """Each of eight lines beside a picture of many colours keeps its own: a pixel is less than 12 of 255 levels away."""
    from PIL import Image, ImageColor

    from bayes_klrl.export.plot_style import COLOURS

    wanted = np.array([ImageColor.getrgb(colour) for colour in COLOURS])
    image = np.full((800, 1200, 3), 255, dtype=np.uint8)
    rows, columns = np.mgrid[:800, :600] % 256
    image[:, :600] = np.stack([columns, rows, columns], axis=-1)
    for row, colour in enumerate(wanted):
        image[80 * row + 40 : 80 * row + 46, 700:] = colour
    Image.fromarray(image).save(tmp_path / "lines.png")
    (tmp_path / "small.png").write_bytes(script("collect_gallery").thumbnail(tmp_path / "lines.png"))
    with Image.open(tmp_path / "small.png") as small:
        pixels = np.asarray(small.convert("RGB")).reshape(-1, 3).astype(int)
    assert max(np.abs(pixels - colour).max(axis=1).min() for colour in wanted) < 12


def faults(site: Path) -> list[str]:
    """What is wrong with the collected files of a site."""
    file = site / "findings.json"
    findings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    small = {picture.stem for picture in site.glob("*.png") if picture.stat().st_size <= 40_000}
    lost = [name for name, found in findings.items() if not (ROOT / found["source"]).is_file() or name not in small]
    return lost + [picture.stem for picture in site.glob("*.png") if picture.stem not in findings]


def test_what_was_collected_is_whole() -> None:
    assert faults(DOCS / "gallery") == []


def test_what_is_not_whole_is_found(tmp_path: Path) -> None:
    (tmp_path / "findings.json").write_text('{"a": {"source": "README.md"}, "b": {"source": "no.py"}}')
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"0" * 50_000)
    assert faults(tmp_path) == ["a", "b", "c"]


def test_a_card_shows_what_was_found() -> None:
    found = {
        "title": "T.",
        "room": "language",
        "source": "bayes_klrl/gallery/language/x.py",
        "better": "by 2_3 *nats*",
        "worse": "w",
        "seconds": 61.2,
    }
    text = GALLERY.markdown({"x": found}, "language")
    assert "by 2\\_3 \\*nats\\*" in text
    assert "gallery/x.png" in text
    assert "{download}`source <../bayes_klrl/gallery/language/x.py>`" in text
    assert "61 s" in text
    assert "No example" in GALLERY.markdown({"x": found}, "decisions")
    assert "Setting" not in text  # it is no example, so that nothing is declared
    declared = glance_of(examples()["soft_values"])
    card = GALLERY.markdown({"soft_values": found}, "language")
    assert f"**In the picture.** {declared.picture}" in card
    assert f"**Setting.** {declared.setting}" in card


def plain(text: str) -> list[str]:
    """The words of a text, without a mark of HTML or the colon after a name."""
    return [word.rstrip(":") for word in unescape(text).split()]


def test_the_table_of_the_site_is_that_of_the_gallery_s_page(tmp_path: Path) -> None:
    """Cell by cell, without their markup."""
    collected = json.loads((DOCS / "gallery" / "findings.json").read_text(encoding="utf-8"))
    findings = {name: found for name, found in collected.items() if name != "explain"}  # one was not run
    for name, found in findings.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (tmp_path / name / "finding.json").write_text(json.dumps(found | {"picture": "p.png", "report": "report.html"}))
    page = write_index(findings, tmp_path).read_text(encoding="utf-8")
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    of_page = [re.sub("<[^>]*>", " ", row.replace("Report</a>", "</a>")) for row in body.split("<tr>")[1:]]
    table = GALLERY.at_a_glance(findings)
    of_site = [re.sub(r"(?<!\\)\||\\|\*\*|`", "", LINK.sub(r"\1 ", row)) for row in table.splitlines()[2:]]
    assert [plain(row) for row in of_site] == [plain(row) for row in of_page]
    assert any("not run" in row and "explain" in row for row in of_site)
    assert {f"gallery-{name}" for name in findings} == set(re.findall(r"\(#([^)]+)\)", table))
    cards = "".join(GALLERY.markdown(findings, room) for room in GALLERY.ROOMS)
    assert {f"gallery-{name}" for name in findings} == set(re.findall(r"^\(([^)]+)\)=$", cards, re.MULTILINE))


def test_docstrings_keep_their_formulas() -> None:
    lines = ["The density (theory.md 3.2, 3.10) of |x|:", "", "    p*(x) = 1", "", "More, and `a|b`.", "", ">>> 1", "1"]
    assert DOCSTRINGS.with_formulas(lines) == [
        "The density (:ref:`theory.md 3.2 <theory-3.2>`, :ref:`3.10 <theory-3.10>`) of \\|x\\|:",
        "",
        "::",
        "",
        "    p*(x) = 1",
        "",
        "More, and `a|b`.",
        "",
        ">>> 1",
        "1",
    ]


def test_sections_of_the_theory_get_labels() -> None:
    assert (
        LABELS.labelled("## 3. SMC\n\n### 3.10 Islands\n")
        == "(theory-3)=\n## 3. SMC\n\n(theory-3.10)=\n### 3.10 Islands\n"
    )


def test_links_that_end_in_a_number_lead_to_the_section() -> None:
    text = "[theory 3.10](../theory.md), [9](theory.md) and [the theory](theory.md)"
    assert LABELS.led_to_sections(text) == "[theory 3.10](#theory-3.10), [9](#theory-9) and [the theory](theory.md)"
