"""Joint programs of other shapes, in Pyro and NumPyro, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import full_table, z_score
from tests.inference.svi.joint import PROMPTS, Problem, coin_posterior, observed_theta, theta, with_sites
from tests.inference.svi.ppl import PPLS, Ppl


@pytest.fixture(params=["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def ppl(request: pytest.FixtureRequest) -> Ppl:
    """Pyro or NumPyro."""
    return PPLS[request.param]


# --- programs of other shapes -------------------------------------------------------------------------------


def test_an_autoguide_for_the_continuous_part(ppl: Ppl) -> None:
    """It draws an auxiliary site and a Delta: both are understood."""
    problem = Problem(ppl, "independent")
    problem.params |= {"loc": 0.2, "log_sd": np.log(0.6)}
    auto = ppl.autoguide(problem.model, loc=0.2, sd=0.6)

    def guide() -> None:
        auto()
        table = ppl.table(problem.start, ppl.param("logits", problem.params["logits"]))
        with ppl.plate("prompts", 1) as chosen:
            ppl.sample("x", ppl.completions(table, PROMPTS, chosen, 2))

    logits = {"logits": problem.params["logits"]}
    values, runs = ppl.sampled(ppl.loss(64), problem.model, guide, logits, 60)
    assert abs(z_score(values, problem.exact()[0])) < 4
    assert np.abs(runs).max() > 0.01


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["ours", "TraceGraph_ELBO"])
def test_a_posteriors_own_program_is_part_of_a_larger_one(ppl: Ppl, kind: str, trained: bool) -> None:
    """The posterior's program inside another, its factor beside the user's own, which is outside of the prompts' plate."""
    posterior = coin_posterior()
    table: Any = posterior.prior
    inner, inner_guide = ppl.programs(posterior, ppl.engine.guide(full_table(table, 4)) if trained else table)
    p = ppl.completions(table, posterior.prompt_ids, ppl.array(np.arange(2)), 3)

    def model() -> None:
        scale = ppl.sample("scale", ppl.dist.LogNormal(ppl.array(0.0), ppl.array(0.5)))
        lengths = p.features(lambda tokens, lengths: lengths, inner())
        ppl.factor("taste", -(scale * lengths).sum(-1)[..., None])

    def guide() -> None:
        ppl.sample("scale", ppl.dist.LogNormal(ppl.param("loc", 0.0), ppl.array(0.3)))
        inner_guide()

    loss = ppl.loss(256) if kind == "ours" else ppl.graph_loss(256)
    values, runs = ppl.sampled(loss, model, guide, {"loc": 0.0}, 30)
    lengths = 2 * 1.75  # E of both prompts
    kl = np.log(0.5 / 0.3) + 0.5 * (0.3 / 0.5) ** 2 - 0.5
    assert abs(z_score(values, lengths * (np.exp(0.3**2 / 2) - 1) + kl)) < 4
    assert abs(z_score(runs[:, 0], lengths * np.exp(0.3**2 / 2))) < 4


# --- refusals -----------------------------------------------------------------------------------------------

First = Callable[[Ppl], Any] | None


def taste_of_0(ppl: Ppl) -> Any:
    return ppl.factor("taste", ppl.array(-np.inf))


def taste_of_nan(ppl: Ppl) -> Any:
    return ppl.factor("taste", ppl.array(np.nan))


@pytest.mark.parametrize(
    "model_first,guide_first,message",
    [
        (theta, None, "'theta' that the guide does not draw"),
        (None, theta, "guide draws 'theta', which is no latent site"),
        (observed_theta, theta, "guide draws 'theta', which is no latent site"),
        (taste_of_0, None, r"with ids \[.*'taste' is 0.*eps"),
        (taste_of_nan, None, "log-prob of site 'taste' is nan"),
    ],
)
def test_what_would_be_lost_is_refused(ppl: Ppl, model_first: First, guide_first: First, message: str) -> None:
    """In the same words."""
    model, guide = with_sites(ppl, model_first, guide_first)
    with pytest.raises(bk.BayesKLRLError, match=message):
        ppl.step(ppl.loss(4), model, guide, validate=model_first is not taste_of_nan)


def test_features_that_are_none_are_refused(ppl: Ppl) -> None:
    x = ppl.array(np.zeros((5, 1, 3), dtype=np.int32))
    p = ppl.completions(coin_posterior().prior, [()], ppl.array(np.arange(1)), 3)
    assert p.features(lambda tokens, lengths: np.ones((len(tokens), 4)), x).shape == (5, 1, 4)
    seen = p.features(lambda tokens, lengths: tokens, ppl.array([[0, 1, 0]]))
    assert seen.tolist() == [[0, 1, 1]]  # EOS past the end, whatever stood there
    for wrong in (np.ones(4), np.ones((5, 2, 2)), 1.0, np.full(5, np.nan)):
        with pytest.raises(bk.RewardError, match="Features of 5 completions"):
            p.features(lambda tokens, lengths: wrong, x)  # noqa: B023
