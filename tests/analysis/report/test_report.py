"""The page of a report: complete, self-contained, escaped, and the same numbers as the results."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.report.samples import pieces_of, samples_of
from tests.analysis.report.pages import HOSTILE, Page, posterior, results


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return results()


@pytest.fixture(scope="module")
def text(found: list[Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert bk.report(found, file, title="Ha & ha", command="python ha.py --seed 0") == file
    return file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_part_is_there(found: list[Any], text: str) -> None:
    page = Page(text)
    assert page.open == []
    headings = [h.split(">")[-1] for h in re.findall(r"<h2>([^<]*)</h2>", text)]
    assert headings == [
        "The posterior",
        "Methods",
        "Training of SVI",
        "Certificate",
        "Frontier",
        "Samples before and after",
        "Cost",
        "Versions and command",
    ]
    said = "".join(page.texts)
    comparison, certificate, _ = found
    exact = f"log evidence {comparison['exact'].log_evidence.mean():.3f} nats, exactly"
    for words in (certificate.verdict, exact, "Ha & ha", "python ha.py --seed 0", "bayes_klrl", bk.__version__):
        assert words in said


def test_it_needs_nothing_but_itself(text: str) -> None:
    page = Page(text)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.of("img"))
    assert len(page.of("img")) == 4
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all((link["href"] or "").removeprefix("#") in targets for link in page.of("a"))
    assert [link["href"] for link in page.of("link")] == ["data:,"]
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    assert not re.search(r"@import|url\(", text)


def test_people_who_do_not_see_it_are_told(text: str) -> None:
    page = Page(text)
    assert all(image["alt"] for image in page.of("img"))
    assert page.of("html") == [{"lang": "en"}]
    assert all(heading.get("scope") == "col" for heading in page.of("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_what_models_and_people_wrote_does_nothing(text: str) -> None:
    page = Page(text)
    assert len(page.of("script")) == 1
    assert HOSTILE in "".join(page.texts)
    assert HOSTILE not in text


def test_samples_have_their_own_rewards_weights_and_log_probs(found: list[Any]) -> None:
    problem, comparison = posterior(), found[0]
    answers = {name: draws[0] for name, draws in comparison.draws.items()}
    samples = samples_of(problem, answers, 5, 2, seed=3)
    assert {sample.method for sample in samples} == {"prior", *answers}
    texts = {name: draws.texts() for name, draws in answers.items()}
    words = {f"{prompt}": p for p, prompt in enumerate(comparison["exact"].prompt_words()[:2])}
    for sample in samples:
        p = words[sample.prompt]
        assert sample.reward == sample.text.count("!")
        assert (sample.log_guide is not None) == (sample.method == "SVI")
        if sample.method == "prior":
            continue
        draws = answers[sample.method]
        own = [n for n, each in enumerate(texts[sample.method][p]) if each == sample.text]
        assert min(abs(draws.weights[p, own] - sample.weight)) < 1e-12
        assert min(abs(draws.log_prior[p, own] - sample.log_prior.sum())) < 1e-9
        if sample.log_guide is not None:
            assert min(abs(draws.log_proposal[p, own] - sample.log_guide.sum())) < 1e-5


def test_completions_are_drawn_by_weight() -> None:
    """The first of them, over many seeds, by chi-square against the exact weights."""
    from scipy import stats

    problem = posterior().select([0])
    exact = bk.Exact().run(problem, seed=0)
    mass: dict[str, float] = {}
    for text, weight in zip(exact.texts()[0], exact.weights[0], strict=True):
        mass[text] = mass.get(text, 0.0) + weight
    seen = dict.fromkeys(mass, 0)
    for seed in range(400):
        first = next(s for s in samples_of(problem, {"exact": exact}, 1, 1, seed) if s.method == "exact")
        seen[first.text] += 1
    common = [text for text in mass if mass[text] * 400 >= 5]
    counts = [*(seen[text] for text in common), 400 - sum(seen[text] for text in common)]
    expected = [*(400 * mass[text] for text in common), 400 * (1 - sum(mass[text] for text in common))]
    kept = [index for index, each in enumerate(expected) if each > 1e-9]
    p = stats.chisquare([counts[i] for i in kept], [expected[i] for i in kept]).pvalue
    assert p > 1e-3


def test_pieces_are_the_text() -> None:
    prior = bk.TorchLM.from_pretrained("austen")
    ones = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    problem = bk.Posterior(prior, ones, prompts="It was", max_new_tokens=16)
    ids = prior.encode([" a fine “morning” — naïve"])[0]
    pieces = pieces_of(problem, 0, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == " a fine “morning” — naïve"
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.slow
def test_a_folder_is_shown_without_its_models(
    found: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sys.argv", ["/usr/bin/bayes-klrl", "compare", "my file.py"])
        found[0].save(tmp_path / "out")
    page = bk.report(tmp_path / "out", tmp_path / "report.html").read_text(encoding="utf-8")
    said = "".join(Page(page).texts)
    assert "Methods: numbers" in said
    assert f"{found[0].table().loc['SVI', 'elbo']:.4g}" in said
    assert HOSTILE not in page
    assert HOSTILE in said
    assert "bayes-klrl compare 'my file.py'" in said  # the command that wrote the folder


@pytest.mark.parametrize("what", [None, [], 3, ["no result"]])
def test_what_is_no_result_is_refused(what: Any, tmp_path: Path) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"A report shows what bk\.compare"):
        bk.report(what, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bk.BayesKLRLError, match="There is no folder"):
        bk.report(tmp_path / "nowhere", tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(bk.BayesKLRLError, match="holds no table, picture, certificate or draws"):
        bk.report(tmp_path / "empty", tmp_path / "report.html")
    (tmp_path / "posterior.py").touch()
    with pytest.raises(bk.BayesKLRLError, match="There is no folder"):
        bk.report(tmp_path / "posterior.py", tmp_path / "posterior.py" / "report.html")
    with pytest.raises(bk.OutputError):
        bk.report([bk.frontier(posterior(), num_draws=64, seed=0)], tmp_path / "file" / "\0" / "report.html")


@pytest.mark.parametrize(
    "name, content",
    [
        ("table.csv", b""),
        ("table.csv", b"x,y\n1,2\n1,2,3\n"),
        ("table.csv", b"\xff\xfe,y\n1,2\n"),
        ("certificate.txt", b"\xff\xfe"),
        ("comparison.png", b"no picture"),
    ],
)
def test_a_file_of_a_folder_that_cannot_be_read_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bk.BayesKLRLError, match=f"{name}' cannot be read: .*take the file out of it"):
        bk.report(tmp_path, tmp_path / "report.html")


def test_folders_and_broken_links_with_the_names_of_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    (tmp_path / "prompts.csv").mkdir()
    (tmp_path / "frontier.png").symlink_to(tmp_path / "nowhere")
    assert "Methods: numbers" in bk.report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_draws_are_shown_after_their_own_prompts_only(tmp_path: Path) -> None:
    """Under another posterior their log-probs would be those of other prompts."""
    own = posterior()
    other = bk.Posterior(own.prior, own.likelihood, prompts=["a", "h", "ha "], max_new_tokens=4)
    here, there = (bk.ImportanceSampling(32).run(each, seed=0) for each in (own, other))
    with pytest.raises(bk.BayesKLRLError, match="draws for other prompts than those of posterior="):
        bk.report(there, tmp_path / "report.html", posterior=own)
    there = dataclasses.replace(there, method="elsewhere")
    page = bk.report([here, there], tmp_path / "report.html", posterior=own).read_text(encoding="utf-8")
    assert "<h4>ImportanceSampling</h4>" in page
    assert "<h4>elsewhere</h4>" not in page


def test_pictures_of_ones_own_are_shown(tmp_path: Path) -> None:
    curve = bk.frontier(posterior(), num_draws=64, seed=0)
    file = curve.plot(tmp_path / "mine.png")
    page = Page(
        bk.report(curve, tmp_path / "report.html", pictures={"Mine & <yours>": file}).read_text(encoding="utf-8")
    )
    assert page.of("img")[0]["alt"] == "Mine & <yours>"
    assert len(page.of("img")) == 2
    for wrong in (tmp_path / "none.png", tmp_path / "report.html"):
        with pytest.raises(bk.BayesKLRLError, match="is no PNG file"):
            bk.report(curve, tmp_path / "other.html", pictures={"mine": wrong})


def test_one_draw_and_one_fit_are_enough(found: list[Any], tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(32).run(posterior(), seed=0)
    page = bk.report([draws, found[0].fits["SVI"]], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Draws of ImportanceSampling" in page
    assert np.isfinite(draws.log_evidence).all()
