"""What each kind of result contributes to a report. A new kind of result is one function here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np

from bayes_klrl.analysis.amortisation.amortise import Amortisation
from bayes_klrl.analysis.certificate.certificate import Certificate
from bayes_klrl.analysis.comparison.compare import Comparison
from bayes_klrl.analysis.comparison.table import comparison_verdict
from bayes_klrl.analysis.frontier.frontier import Frontier
from bayes_klrl.analysis.frontier.picture import policy_point
from bayes_klrl.analysis.report.page import Section, interactive, paragraph, picture
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.notebook import draws_html
from bayes_klrl.export.pictures import plot_history, plot_weights
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.suite.run import SuiteResult

__all__ = ["Reported", "reported"]


@dataclass(frozen=True, eq=False)
class Reported:
    """What a result says.

    Parameters
    ----------
    sections
        The sections about it.
    verdict
        Its verdict in one sentence; "" for none.
    posterior
        The posterior that it is about, if it knows.
    answers
        The draws of each answer, by name.
    costs
        The cost of each piece of work, by name.
    beside
        Function that returns further sections, which show the answers of all results of the report; None for none.
    """

    sections: tuple[Section, ...]
    verdict: str = ""
    posterior: Posterior | None = None
    answers: Mapping[str, Draws] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    beside: Callable[[Mapping[str, Draws]], tuple[Section, ...]] | None = None


@singledispatch
def reported(result: Any) -> Reported:
    """Return what a result contributes to a report.

    Parameters
    ----------
    result
        A result of this package.

    Raises
    ------
    BayesKLRLError
        If it is no result.
    """
    raise BayesKLRLError(
        "A report shows what bk.compare, bk.certify, bk.frontier, bk.amortise, bk.run_suite, SVI.fit and the `run` of an "
        f"algorithm return, several of them in a list, or a folder that `bayes-klrl` wrote; got {result!r}."
    )


@reported.register
def _(result: Comparison) -> Reported:
    table = result.table()
    numbers, *notes = table.html_parts()
    shown = picture(
        result.plot,
        "Log evidence and its lower bound, reward against KL to the prior, effective sample sizes and rewards of each method.",
    )
    body = interactive(str(numbers), "methods") + "".join(paragraph(str(note)) for note in notes)
    sections = [Section("Methods", body + shown)]
    for name, fit in result.fits.items():
        sections.append(training(fit, f"Training of {name}"))
    draws = {name: repeats[0] for name, repeats in result.draws.items()}
    costs = {name: each.cost for name, each in draws.items()}
    return Reported(tuple(sections), comparison_verdict(table), result.posterior, draws, costs)


@reported.register
def _(result: Certificate) -> Reported:
    words = "The bounds on log Z with the policy's ELBO, and both KLs between policy and posterior, in nats."
    body = result._repr_html_() + picture(result.plot, words)
    drawn = {} if result.exact_draws is None else {"exact draws": result.exact_draws}
    return Reported(
        (Section("Certificate", body),),
        result.verdict,
        answers={"policy": result.draws, **drawn},
        costs={"certificate": result.cost},
    )


@reported.register
def _(result: Frontier) -> Reported:
    def beside(answers: Mapping[str, Draws]) -> tuple[Section, ...]:
        points = {name: point for name, draws in answers.items() if (point := point_of(name, draws)) is not None}
        words = "Reward against KL to the prior over all alphas, with the answers on it; no policy is above the line."
        body = result._repr_html_() + picture(lambda file: result.plot(file, policies=points), words)
        return (Section("Frontier", body),)

    return Reported((), costs={"frontier": result.cost}, beside=beside)


@reported.register
def _(result: Amortisation) -> Reported:
    words = (
        "The distance of one guide to the posteriors of the prompts that it was trained on and of others, and its cost."
    )
    body = result._repr_html_() + picture(result.plot, words)
    return Reported((Section("One guide for many prompts", body),), result.verdict)


@reported.register
def _(result: SuiteResult) -> Reported:
    table = result.table().reset_index().to_html(index=False, border=0, na_rep="-", float_format=lambda x: f"{x:.4g}")
    words = "The error of log Z of each method, a panel for each problem."
    return Reported((Section("Suite", interactive(table, "answers") + picture(result.plot, words)),))


@reported.register
def _(result: Draws) -> Reported:
    body = draws_html(result)
    if not (result.log_weights == 0).all() and np.isfinite(result.log_weights).any():
        body += picture(lambda file: plot_weights(result, file), "How the weight is spread over the draws.")
    return Reported(
        (Section(f"Draws of {result.method}", body),),
        answers={result.method: result},
        costs={result.method: result.cost},
    )


@reported.register
def _(result: Fit) -> Reported:
    return Reported((training(result, "Training"),), costs={"training": result.training})


def training(fit: Fit, heading: str) -> Section:
    """Return the section about a training."""
    words = "ELBO, reward, KL to the prior and effective sample size of each step of the training, in nats."
    return Section(heading, picture(lambda file: plot_history(fit.history, file), words))


def point_of(name: str, draws: Draws) -> tuple[float, float] | None:
    """Return (KL to the prior, reward) of an answer; None if it has no density, or no mean."""
    try:
        return policy_point(name, draws)
    except BayesKLRLError:
        return None
