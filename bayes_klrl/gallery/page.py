"""Writes the gallery's page: what it is about, the table "At a glance", and what each example found, with its report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from bayes_klrl.analysis.report.page import Section, document, paragraph, picture_of_file
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.index import ROOMS, Row, at_a_glance, examples, title_of
from bayes_klrl.whole_files import write_whole

__all__ = ["HEADS", "write_index"]

HEADS = ("job", "what people do today", "what inference adds", "did it help?")

_TITLE = "What is RL as Bayesian inference good for?"
_ABOUT = (
    "A language model is a prior p0(x) over completions. A reward r makes it a posterior, p*(x) proportional to "
    "p0(x) exp(r(x) / alpha), and this posterior is the optimal policy of KL-regularised RL. So the methods of Bayesian "
    "inference apply: exact sums, importance sampling (IS), sequential Monte Carlo (SMC) while decoding, which a twist, an "
    "estimate of what a prefix will be worth, can steer, and variational inference (SVI), which tunes a policy once for all "
    "later prompts. A certificate says how far a policy is from the posterior: bounds on the KL divergence in nats, which "
    "hold with a stated probability.",
    "Each example does one job as people do it today and by inference, and says where inference was better and where it was "
    "not. Its report has the whole comparison. All numbers come from the runs on this page, one run of each example; ± is one "
    "standard error.",
    "Words in all examples: draws that are weighted count for fewer, the effective draws, and their number is the "
    "effective sample size (ESS). Prior IS is importance sampling from the prior: its draws, weighted by the "
    "likelihood. Best of n is the best-rewarded of n draws. A plug-in policy takes an estimate of the reward for the "
    "true one. A distillation is a small model, fitted to draws of a large one, for which the posterior is exact. The "
    "words of one example are explained with it.",
)
_STYLE = """
.glance { width: 100%; table-layout: fixed; }
.glance :is(th, td) { text-align: left; vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }
.glance thead th { font-weight: 600; }
.glance :is(th, td):last-child { width: 36%; }
.glance th :is(a, strong) { display: block; font-weight: 600; }
article { margin: 2rem 0; }
article figure img { max-height: 26rem; width: auto; }
@media (max-width: 44rem) {
  .glance thead { display: none; }
  .glance :is(tbody, tr, th, td) { display: block; border: 0; }
  .glance :is(th, td):last-child { width: auto; }
  .glance tr { margin: .8rem 0; padding: .3rem; background: var(--card); border-radius: .3rem; }
  .glance td::before { content: attr(data-head); display: block; color: var(--quiet); font-size: .8rem; }
}
"""


def write_index(names: Iterable[str], out: Path) -> Path:
    """Write the page, from the folders of the named examples below `out`; the others are in the table as not run.

    Raises
    ------
    BayesKLRLError
        If the `finding.json` of a named example is missing, or cannot be read.
    """
    found = {name: Finding.load(out / name) for name in names}
    rows = at_a_glance({name: _numbers(each) for name, each in found.items()})
    sections = [
        Section("What this is", "".join(map(paragraph, _ABOUT))),
        Section("At a glance", paragraph(_count(rows)) + _table(rows, found)),
    ]
    for room, words in ROOMS.items():
        shown = [row for row in rows if row.room == room and row.name in found]
        if shown:
            sections.append(Section(words, "".join(_article(row, found[row.name], out) for row in shown)))
    return write_whole(out / "index.html", document(_TITLE, [], sections, style=_STYLE))


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return dict(found["numbers"])


def _count(rows: list[Row]) -> str:
    """Return in how many examples inference helped."""
    kinds = Counter(re.split("[.:]", row.helped)[0].lower() for row in rows)
    order = ("yes", "partly", "no", "not in this run", "run again", "not run")
    said = [f"{kind} in {kinds[kind]}" for kind in order if kind in kinds]
    return f"Did inference help? Of {len(rows)} examples: {', '.join(said)}."


def _table(rows: list[Row], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table; on a narrow screen each row is a card, and each cell says what it is."""
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    body = "".join(_row(row, found.get(row.name)) for row in rows)
    return f'<table class="glance"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _row(row: Row, found: Mapping[str, Any] | None) -> str:
    name, glance = escape(row.name), row.glance
    link = f'<a href="#{name}">{name}</a>' if found else f"<strong>{name}</strong>"
    report = f' <a href="{name}/{escape(str(found["report"]))}">Report</a>' if found else ""
    verdict, _, measured = row.helped.partition(". ")
    told = f"<strong>{escape(verdict)}.</strong> {escape(measured)}" if measured else escape(verdict)
    cells = (escape(glance.today), escape(glance.adds), told + report)
    data = "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in zip(HEADS[1:], cells, strict=True))
    return f'<tr><th scope="row">{link}{escape(glance.job)}</th>{data}</tr>'


def _article(row: Row, found: Mapping[str, Any], out: Path) -> str:
    """Return the part of the page for an example that was run."""
    title = title_of(examples()[row.name]).rstrip(".")
    return (
        f'<article id="{row.name}"><h3>{escape(title)}</h3>'
        f"<p><strong>Setting.</strong> {escape(row.glance.setting)}</p>"
        f"<p><strong>Where inference is better.</strong> {escape(str(found['better']))}</p>"
        f"<p><strong>Where it is not.</strong> {escape(str(found['worse']))}</p>"
        f"{picture_of_file(out / row.name / str(found['picture']), row.glance.picture)}"
        f'<p><a href="{row.name}/{found["report"]}">The report of {row.name}</a>, made in {found["seconds"]:.0f} s by '
        f"<code>bayes-klrl gallery {row.name}</code></p></article>"
    )
