"""Completions and continuous latents in one program of Pyro or NumPyro, against enumeration times quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from tests.helpers.truth import z_score
from tests.inference.svi.joint import CASES, Problem, agrees, p_value
from tests.inference.svi.ppl import PPLS, Ppl


@pytest.fixture(params=["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def ppl(request: pytest.FixtureRequest) -> Ppl:
    """Pyro or NumPyro."""
    return PPLS[request.param]


def on_numpyro(order: str) -> Any:
    """A case of NumPyro, which compiles: of two prompts, and slow if it is none of the quick ones."""
    return pytest.param(
        "numpyro", order, 2, marks=() if order in ("independent", "x, then theta") else pytest.mark.slow
    )


BOTH = [*(("pyro", *case) for case in CASES), *map(on_numpyro, dict(CASES))]


@pytest.mark.slow
@pytest.mark.parametrize("ppl,order,num_prompts", BOTH, indirect=["ppl"])
def test_value_and_gradient_are_those_of_enumeration_times_quadrature(ppl: Ppl, order: str, num_prompts: int) -> None:
    problem = Problem(ppl, order, num_prompts)
    exact, gradient = problem.exact()
    values, runs = problem.sampled(ppl.loss(64), 75)
    assert agrees(runs, gradient)
    assert abs(z_score(values, exact)) < 3.5
    assert not agrees(1.25 * runs, gradient)  # the test bites


@pytest.mark.parametrize("order,num_prompts", CASES)
def test_the_quadrature_has_nodes_enough(order: str, num_prompts: int) -> None:
    problem = Problem(PPLS["pyro"], order, num_prompts)
    (fine, gradient), (coarse, of_coarse) = problem.exact(40), problem.exact(20)
    assert coarse == pytest.approx(fine, abs=1e-9)
    np.testing.assert_allclose(of_coarse, gradient, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["independent", "x, then theta", "z of each prompt"])
def test_subsampled_prompts_are_scaled_up(ppl: Ppl, order: str) -> None:
    """For q(theta | x) the guide itself depends on the subsample: its theta sees one prompt, not two."""
    problem = Problem(ppl, order, 2, subsample=1)
    if order == "x, then theta":
        assert np.isfinite(problem.sampled(ppl.loss(8), 2)[1]).all()
        return
    assert agrees(problem.sampled(ppl.loss(64), 120)[1], Problem(ppl, order, 2).exact()[1])


@pytest.mark.slow
def test_subsampled_data_are_scaled_up(ppl: Ppl) -> None:
    problem = Problem(ppl, "x, then theta")
    _, gradient = problem.exact()
    problem.num_preferences = 2
    _, runs = problem.sampled(ppl.loss(32), 150)
    assert agrees(runs, gradient)
    problem.num_preferences = 4
    _, of_all = problem.sampled(ppl.loss(32), 40)
    assert of_all.var(axis=0).sum() < runs.var(axis=0).sum()  # they are there


@pytest.mark.slow
@pytest.mark.parametrize("order", ["independent", "x, then theta", "theta, then x"])
def test_trace_graph_elbo_agrees_on_the_same_program(ppl: Ppl, order: str) -> None:
    """The languages' own loss sees what depends on x; in Pyro features keep the provenance for it (theory.md 9.7)."""
    problem = Problem(ppl, order)
    assert agrees(problem.sampled(ppl.graph_loss(64), 80)[1], problem.exact()[1])


# --- the tests bite -----------------------------------------------------------------------------------------

OTHERS, COUPLING = "the other sites in the score's weight", "that theta depends on every x"


def pyro_without(lost: str, site_terms: Callable[..., Any]) -> Callable[..., Any]:
    """The function of Pyro's loss that reads the sites, with a mistake."""

    def broken(*arguments: Any) -> Any:
        terms = site_terms(*arguments)
        if lost == COUPLING:
            return replace(terms, whole=False)
        outside = terms.outside - terms.outside.detach()
        return replace(terms, inside=terms.inside - terms.inside.detach(), outside=outside)

    return broken


def numpyro_without_others(parts: Callable[..., Any]) -> Callable[..., Any]:
    """The function of NumPyro's loss that weighs the score, which sees x alone."""

    def broken(terms: Any, *arguments: Any) -> Any:
        of_x = [(site, log_prob) for site, log_prob in terms if site["name"] == "x"]
        return parts(terms, *arguments)._replace(weights=parts(of_x, *arguments).weights)

    return broken


@pytest.mark.slow
@pytest.mark.parametrize("lost", [OTHERS, COUPLING])
def test_the_gradient_tests_bite(ppl: Ppl, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a term of the score's weight left out the same comparison fails."""
    problem = Problem(ppl, "x, then theta", 2)
    _, gradient = problem.exact()
    module: Any = import_module(f"bayes_klrl.inference.svi.{ppl.name}_backend.elbo")
    if ppl.name == "pyro":
        monkeypatch.setattr(module, "site_terms", pyro_without(lost, module.site_terms))
    elif lost == OTHERS:
        monkeypatch.setattr(module, "_parts", numpyro_without_others(module._parts))
    else:
        monkeypatch.setattr(module, "_any_outside_after", lambda *arguments: False)
    assert p_value(problem.sampled(ppl.loss(128), 75)[1], gradient) < 1e-4
