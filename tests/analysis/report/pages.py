"""Results for reports, and a reader of their pages."""

from __future__ import annotations

from html.parser import HTMLParser

import bayes_klrl as bk

HOSTILE = "<img src=x onerror=document.title='attacked'>"


def posterior() -> bk.Posterior:
    """Three prompts, one of which is hostile; texts of characters."""
    prior = bk.NgramLM.fit(["ha!", "ha ha!", "h<!", "aha"], order=2)
    cheerful = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=0.5, bounds=(0, 4))
    return bk.Posterior(prior, cheerful, prompts=["h", "a", "ha "], max_new_tokens=4)


def results() -> list[object]:
    """One of most kinds."""
    problem = posterior()
    methods = {
        "exact": bk.Exact(),
        HOSTILE: bk.ImportanceSampling(64),
        "SVI": bk.SVI(4, num_particles=16, num_draws=32),
        "impossible": bk.SMC(8),
    }
    comparison = bk.compare(problem, methods, seed=0)
    guide = comparison.fits["SVI"].guide
    return [comparison, bk.certify(problem, guide, seed=0, num_draws=64), bk.frontier(problem, num_draws=256, seed=0)]


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), texts, and tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
