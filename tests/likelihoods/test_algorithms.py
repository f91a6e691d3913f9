"""Every likelihood of the room through the algorithms, the certificate and the contract, and in products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.backends import prior_on
from tests.helpers.truth import Truth
from tests.likelihoods.common import PRIOR, TUNED, posterior_of, score

SCORE = bk.TokenReward(lambda tokens, lengths: score(tokens, lengths, 0 * lengths), alpha=1.0)
MAKERS: dict[str, Callable[[], bk.Likelihood]] = {
    "implicit": lambda: bk.ImplicitReward(TUNED, beta=0.3, alpha=0.2),
    "power": lambda: bk.Power(1.7),
    "quantile": lambda: bk.QuantileReward(SCORE, alpha=0.5),
    "best of": lambda: bk.BestOf(3, SCORE),
}
every_likelihood = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_likelihood
def test_products_powers_and_alphas_agree(make: Callable[[], bk.Likelihood]) -> None:
    plain = bk.TokenReward(lambda tokens, lengths: 0.3 * lengths, alpha=0.7)
    alone, posterior = Truth(posterior_of(make())), posterior_of(make() * plain)
    log_likelihood = alone.reward / alone.posterior.alpha
    expected = log_likelihood + 0.3 * alone.sequences.lengths / 0.7
    np.testing.assert_allclose(posterior.log_likelihood(alone.sequences), expected, atol=1e-10)
    tempered = posterior_of((make() * plain) ** 0.4)
    np.testing.assert_allclose(tempered.log_likelihood(alone.sequences), 0.4 * expected, atol=1e-10)
    moved = alone.posterior.at_alpha(2 * alone.posterior.alpha)
    np.testing.assert_allclose(moved.log_likelihood(alone.sequences), log_likelihood / 2, atol=1e-10)
    np.testing.assert_array_equal(moved.reward(alone.sequences), alone.reward)
    part = posterior.select([1])
    one = bk.Sequences(alone.sequences.tokens[1:], alone.sequences.lengths[1:])
    np.testing.assert_allclose(part.log_likelihood(one)[0], expected[1], atol=1e-10)


@every_likelihood
@pytest.mark.parametrize("backend", ["ngram", "torch"])
def test_algorithms_take_them(make: Callable[[], bk.Likelihood], backend: str) -> None:
    options = {"max_new_tokens": 3}
    prior = prior_on(backend, PRIOR)
    likelihood = make()
    if backend == "torch" and isinstance(likelihood, bk.ImplicitReward):
        likelihood = bk.ImplicitReward(prior_on("torch", TUNED), beta=0.3, alpha=0.2)
    posterior = posterior_of(likelihood, prior, **options)
    broken = [check for check in bk.check_posterior(posterior).checks if not check.kept]
    assert not broken
    truth = Truth(posterior)
    np.testing.assert_allclose(bk.Exact().run(posterior, seed=0).log_evidence, truth.log_evidence, atol=1e-5)
    for sampler in (bk.ImportanceSampling(4000), bk.SMC(2000), bk.SMC(2000, twist=bk.PartialRewardTwist())):
        draws = sampler.run(posterior, seed=0)  # type: ignore[attr-defined]
        z = (draws.log_evidence - truth.log_evidence) / np.maximum(draws.log_evidence_se, 1e-3)
        assert (np.abs(z) < 4.5).all()


@pytest.mark.slow
@every_likelihood
def test_svi_climbs_and_certify_bounds_the_truth(make: Callable[[], bk.Likelihood]) -> None:
    posterior = posterior_of(make(), max_new_tokens=3)
    truth = Truth(posterior)
    fit = bk.SVI(100, num_particles=64).fit(posterior, seed=0)
    assert np.mean(fit.history["elbo"][-10:]) > np.mean(fit.history["elbo"][:10])
    kl = truth.kl(fit.guide)
    certificate = bk.certify(posterior, fit, seed=0, num_draws=400)
    for bounds, value in (
        (certificate.elbo, truth.log_evidence - kl),
        (certificate.log_evidence_bounds, truth.log_evidence),
        (certificate.reverse_kl, kl),
    ):
        low, high = np.moveaxis(np.asarray(bounds), -1, 0)
        assert ((low - 1e-6 <= value) & (value <= high + 1e-6)).all()


def test_svi_on_torch_takes_one() -> None:
    prior = prior_on("torch", PRIOR)
    posterior = posterior_of(bk.ImplicitReward(prior_on("torch", TUNED), beta=0.3, alpha=0.3), prior, max_new_tokens=3)
    fit = bk.SVI(3, num_particles=8).fit(posterior, seed=0)
    assert np.isfinite(fit.history["elbo"]).all()
