"""A policy as likelihood: the policy itself at alpha = beta, enumeration elsewhere, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.likelihoods.implicit import ImplicitReward
from tests.helpers.backends import prior_on
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth
from tests.likelihoods.common import NUM_TOKENS, PRIOR, REFERENCE, TUNED, every, posterior_of


def implicit(**options: Any) -> bk.ImplicitReward:
    return bk.ImplicitReward(TUNED, **{"beta": 0.3, "alpha": 0.3} | options)


@pytest.mark.parametrize("beta", [0.01, 0.3, 7.0])
def test_at_alpha_beta_the_posterior_is_the_policy_and_log_z_is_0(beta: float) -> None:
    truth = Truth(posterior_of(implicit(beta=beta, alpha=beta)))
    np.testing.assert_allclose(truth.log_evidence, 0, atol=1e-10)
    np.testing.assert_allclose(truth.log_posterior, every(TUNED, truth.sequences), atol=1e-9)


@pytest.mark.parametrize("reference", [None, REFERENCE])
@pytest.mark.parametrize("alpha", [0.15, 0.9])
def test_any_alpha_and_reference_are_the_enumerated_ratio(reference: Any, alpha: float) -> None:
    truth = Truth(posterior_of(implicit(reference=reference, alpha=alpha)))
    of = {lm: every(lm, truth.sequences) for lm in (PRIOR, TUNED, REFERENCE)}
    np.testing.assert_allclose(truth.reward, 0.3 * (of[TUNED] - of[reference or PRIOR]), atol=1e-10)
    mass = np.exp(of[PRIOR] + 0.3 / alpha * (of[TUNED] - of[reference or PRIOR]))
    np.testing.assert_allclose(truth.p, mass / mass.sum(axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(truth.log_evidence, np.log(mass.sum(axis=1)), atol=1e-10)


def test_the_log_ratio_of_prefixes_is_the_optimal_twist() -> None:
    """E_p0[policy / p0 | prefix] = policy(prefix) / p0(prefix), so the twisted proposal is the policy, every weight Z."""
    posterior = posterior_of(implicit())

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        padded = np.pad(prefixes, ((0, 0), (0, NUM_TOKENS - prefixes.shape[1])), constant_values=posterior.pad_token)
        reward = posterior.reward_of_rows(padded, np.full(len(prefixes), prefixes.shape[1]), prompt_index)
        return reward / posterior.alpha

    draws = bk.SMC(3, proposal="twisted", twist=twist).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_weights, draws.log_weights[:, :1].repeat(3, axis=1), atol=1e-9)
    np.testing.assert_allclose(draws.log_evidence, 0, atol=1e-9)


def test_the_optimum_of_certify_is_the_policy() -> None:
    posterior = posterior_of(implicit())
    certificate = bk.certify(posterior, TUNED, seed=0, num_draws=200)
    np.testing.assert_allclose(certificate.elbo, 0, atol=1e-9)
    np.testing.assert_allclose(certificate.reverse_kl, 0, atol=1e-6)


def test_folders_fits_and_models_are_one_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, tuned = bk.TorchLM(tiny_gpt2(seed=0)), bk.TorchLM(tiny_gpt2(seed=1))
    tuned.save_pretrained(tmp_path)
    prompts = {"prompts": [[1], [2, 3]], "max_new_tokens": 3}
    by_folder = bk.ImplicitReward(tmp_path, beta=0.5, alpha=0.5)
    posterior = posterior_of(by_folder, prior, **prompts)
    truth = Truth(posterior)
    direct = Truth(posterior_of(bk.ImplicitReward(tuned, beta=0.5, alpha=0.5), prior, **prompts))
    np.testing.assert_allclose(truth.reward, direct.reward, atol=1e-5)
    np.testing.assert_allclose(truth.log_evidence, 0, atol=1e-5)
    # a part of the prompts and another alpha read no folder again
    monkeypatch.setattr("bayes_klrl.inference.policies.load_policy", None)
    part = posterior.at_alpha(0.25).select([1])
    np.testing.assert_allclose(Truth(part).reward[0], truth.reward[1], atol=1e-5)

    fit = bk.SVI(2, num_particles=8).fit(posterior_of(implicit()), seed=0)
    of_fit, of_guide = (posterior_of(implicit(), PRIOR), posterior_of(bk.ImplicitReward(fit, beta=1.0, alpha=1.0)))
    sequences = Truth(of_fit).sequences
    np.testing.assert_allclose(
        of_guide.reward(sequences), every(fit.guide, sequences) - every(PRIOR, sequences), atol=1e-5
    )


def test_what_is_impossible() -> None:
    """-inf where the policy or the prior gives 0; an infinite reward is refused, and names the completion."""
    with np.errstate(divide="ignore"):
        never_two = bk.NgramLM(np.log([0.3, 0.3, 0.0, 0.4]), eos_token_id=3)
        never_one = bk.NgramLM(np.log([0.3, 0.0, 0.3, 0.4]), eos_token_id=3)
    posterior = posterior_of(bk.ImplicitReward(never_two, beta=1.0, alpha=1.0), prompts=[0])
    assert np.isneginf(posterior.reward([[2, 3], [0, 2, 3]])).all()
    assert np.isfinite(posterior.reward([[1, 3], [3]])).all()
    one_prior = posterior_of(bk.ImplicitReward(TUNED, beta=1.0, alpha=1.0), never_two, prompts=[0])
    assert np.isneginf(one_prior.reward([[2, 3]])).all()
    refused = bk.ImplicitReward(TUNED, never_two, beta=1.0, alpha=1.0)
    with pytest.raises(bk.SupportError, match=r"reference .*probability 0 to .*ids \[2, 3\].*infinite"):
        posterior_of(refused, prompts=[0]).reward([[1, 3], [2, 3]])
    assert np.isneginf(posterior_of(refused, never_two, prompts=[0]).reward([[2, 3]])).all()
    with pytest.raises(bk.SupportError):
        posterior_of(refused, never_one, prompts=[0]).reward([[2, 3]])


def test_a_policy_that_returns_nan_is_refused() -> None:
    class Broken(bk.NgramLM):
        def token_log_probs(self, *arguments: Any) -> Any:
            return super().token_log_probs(*arguments) * np.nan

    broken = bk.ImplicitReward(Broken(PRIOR.log_probs, eos_token_id=3), beta=1.0, alpha=1.0)  # type: ignore[attr-defined]
    with pytest.raises(bk.RewardError, match="returned nan"):
        posterior_of(broken, prompts=[0]).reward([[1, 3]])


@pytest.mark.parametrize("wrong", [0, -1.0, np.nan, np.inf, "1", None, True])
def test_beta_and_alpha_are_positive(wrong: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="beta must be a positive"):
        implicit(beta=wrong)
    with pytest.raises(bk.BayesKLRLError, match="alpha must be a positive"):
        implicit(alpha=wrong)


@pytest.mark.parametrize("role", ["policy", "reference"])
@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), bk.CheckpointError, "2 tokens, the prior 4"),
        (bk.NgramLM(PRIOR.log_probs, eos_token_id=2), bk.CheckpointError, "EOS"),  # type: ignore[attr-defined]
        ("no-such-folder", bk.CheckpointError, "no folder 'no-such-folder'"),
        (3.0, bk.BayesKLRLError, "language model"),
        (bk.SVI(1), bk.BayesKLRLError, "fit it first"),
    ],
)
def test_models_that_do_not_fit_are_refused_when_the_posterior_is_made(
    role: str, wrong: Any, error: type[Exception], message: str
) -> None:
    models = {"policy": TUNED, "reference": REFERENCE} | {role: wrong}
    with pytest.raises(error, match=message) as raised:
        posterior_of(bk.ImplicitReward(models["policy"], models["reference"], beta=1.0, alpha=1.0))
    if error is bk.CheckpointError:
        assert f"The {role} of 'implicit reward'" in str(raised.value)


def test_a_policy_is_needed_and_a_posterior_around_it() -> None:
    with pytest.raises(bk.BayesKLRLError, match="got None"):
        bk.ImplicitReward(None, beta=1.0, alpha=1.0)
    bound = posterior_of(implicit()).likelihood
    assert isinstance(bound, ImplicitReward)
    with pytest.raises(bk.BayesKLRLError, match=r"put it into a bk\.Posterior"):
        implicit().values(None)  # type: ignore[arg-type]


def test_on_torch_and_ngram_it_is_one_reward() -> None:
    on_torch = bk.ImplicitReward(prior_on("torch", TUNED), beta=0.3, alpha=0.3)
    truth = Truth(posterior_of(on_torch, prior_on("torch", PRIOR)))
    np.testing.assert_allclose(truth.log_evidence, 0, atol=1e-5)
    np.testing.assert_allclose(truth.reward, Truth(posterior_of(implicit())).reward, atol=1e-5)
