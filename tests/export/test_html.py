"""What results show in a notebook: the verdict first, escaped, without colours, pictures or anything from elsewhere."""

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.draws import Cost
from bayes_klrl.export.html import HtmlTable, html_page

EVIL = "<script>alert('x')</script>&"
PRIOR = bk.NgramLM.fit([EVIL, EVIL + "!", "a cat\n", "a rat "], order=3)
REWARD = bk.Reward(lambda completions: [text.count("a") for text in completions], alpha=1.0, name=f"reward {EVIL}")
POSTERIOR = bk.Posterior(PRIOR, REWARD, prompts=[EVIL[:20], "a ", "a "], max_new_tokens=3, answer=[EVIL] * 3)
FEW = POSTERIOR.select([0])


class Page(HTMLParser):
    """The tags, attributes and texts of a page, which must be well-formed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "br":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def amortisation() -> Any:
    return bk.amortise(POSTERIOR.select([1]), FEW, PRIOR, seed=0, num_draws=32)


def fit() -> Any:
    history = {name: np.array([1.0, 2.0]) for name in ("elbo", "reward", "kl")} | {"step_kl": np.array([0.1, np.nan])}
    return bk.Fit(PRIOR, history, FEW, Cost(training_tokens=1000, training_seconds=2.5))


def comparison() -> Any:
    rows = {EVIL.replace("/", ""): bk.ImportanceSampling(64), "SMC": bk.SMC(16), "best of 2": bk.BestOfN(2, 8)}
    return bk.compare(POSTERIOR, rows, seed=0)


def certificate() -> Any:
    return bk.certify(POSTERIOR, PRIOR, seed=0, num_draws=64, feature=lambda texts: [EVIL] * len(texts))


def audit() -> Any:
    from bayes_klrl.inference.svi.losses import LeaveOneOut

    coins = bk.NgramLM.fit(["ab", "ba"], order=1)
    problem = bk.Posterior(
        coins, bk.Reward(lambda completions: [len(c) for c in completions], alpha=1.0), max_new_tokens=1
    )
    return bk.audit(LeaveOneOut(), problem, num_steps=30)


def curve() -> Any:
    """Of a run with a name that would be a tag."""
    certificates = {step: bk.certify(FEW, PRIOR, seed=0, num_draws=64) for step in (3, 6)}
    return bk.CertificateCurve(EVIL, certificates, skipped={"tmp-checkpoint-9": "it is being written"})


RESULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "posterior": (lambda: POSTERIOR, "posterior = prior × exp"),
    "draws": (
        lambda: bk.ImportanceSampling(200).run(POSTERIOR, seed=0),
        "ImportanceSampling: 200 draws per prompt",
    ),
    "equal draws": (lambda: bk.BestOfN(2, 10).run(FEW, seed=0), "BestOfN: 10 draws that weigh equally"),
    "fit": (fit, "The training ended after 2 steps; its ELBO went from 1.000 to 2.000 nats"),
    "comparison": (comparison, "log evidence"),
    "table": (lambda: comparison().table(), "log evidence"),
    "certificate": (certificate, "nats from the posterior"),
    "curve": (curve, "checkpoint-3 is nearest to the posterior, at"),
    "frontier": (lambda: bk.frontier(POSTERIOR, num_draws=64, seed=0), "At alpha 1: E[r]"),
    "amortisation": (amortisation, "On 1 unseen prompts the guide is"),
    "audit": (audit, "POSTERIOR: LeaveOneOut"),
    "suite": (lambda: bk.run_suite(["P1"], ["smc-exact-twist"], budget=500, repeats=1), "500 model tokens per method"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_its_verdict_first_and_tables_and_is_inert(name: str) -> None:
    make, verdict = RESULTS[name]
    html = make()._repr_html_()
    page = Page(html)
    assert set(page.tags) <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert page.tags[:3] == ["div", "p", "strong"]
    assert page.tags.count("table") >= 1
    assert verdict in page.text[: len(verdict) + 60]
    assert {key for key, _ in page.attributes} <= {"style", "scope"}
    assert not re.search(
        r"color|background|url\(|http|#[0-9a-f]{3}|rgb", " ".join(str(value) for _, value in page.attributes)
    )
    assert "nan" not in page.text.replace("nance", "")
    if name in {"posterior", "comparison", "certificate", "curve"}:
        assert EVIL[:8] in page.text  # it is shown, and is no tag
    if name in {"posterior", "draws", "certificate"}:
        assert "a␣ (prompt 2)" in page.text


def test_doubt_stands_in_the_verdict() -> None:
    shown = Page(bk.ImportanceSampling(20).run(FEW, seed=0)._repr_html_()).text
    assert "below 100: do not trust the error bars" in shown
    exact = Page(bk.Exact().run(FEW, seed=0)._repr_html_()).text
    assert "do not trust" not in exact
    assert "±" not in exact


def test_the_heaviest_completions_are_the_most_probable() -> None:
    draws = bk.Exact().run(FEW, seed=0)
    text, weight = max(zip(draws.texts()[0], draws.weights[0], strict=True), key=lambda pair: pair[1])
    rows = re.findall(r"<tr>(.*?)</tr>", draws._repr_html_())
    first = next(n for n, row in enumerate(rows) if "completion" in row) + 1
    assert f">{weight:.3g}<" in rows[first]
    assert Page(f"<tr>{rows[first]}</tr>").text.startswith(text.replace("\n", "↵"))


def test_draws_without_a_tokenizer_or_with_a_dead_prompt_are_shown() -> None:
    ids = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    draws = bk.ImportanceSampling(8).run(bk.Posterior(ids, longer, prompts=[[0], [0]], max_new_tokens=2), seed=0)
    assert "ids 0 (prompt 1)" in draws._repr_html_()
    dead = draws.log_weights.copy()
    dead[1] = -np.inf
    assert "no draw of some prompt is possible" in replace(draws, log_weights=dead)._repr_html_()


def test_a_table_is_text_in_cells() -> None:
    table = HtmlTable(("word\ncount", "n"), [["a<b", "1"]], caption="two & more")
    page = Page(html_page("near", table, "note"))
    assert page.text == "neartwo & morewordcountna<b1note"
    assert "br" in page.tags
    styles = [value for key, value in page.attributes if key == "style"]
    assert [style.split(";")[0] for style in styles if style] == ["text-align: left", "text-align: right"] * 2
