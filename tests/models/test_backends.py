"""Transformers on torch and on JAX: one distribution, the same draws for the same seed, and the algorithms' protocol."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.reward_models.anchors import posterior_batch
from tests.algorithms import DRAWING, named
from tests.helpers.backends import as_jax
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.truth import Truth

PROMPTS = [[1, 2, 3], [0]]


def gpt2() -> bk.Posterior:
    task = problems.random_gpt2_task(4, vocab_size=5, max_new_tokens=3, hidden=32, layers=1, target_kl=1.0)
    return bk.Posterior(task.prior, task.likelihood, prompts=PROMPTS, max_new_tokens=3)


def llama() -> bk.Posterior:
    lm = bk.TorchLM(tiny_llama(eos_token_id=4), eos_token_id=4)
    longer = bk.TokenReward(lambda tokens, lengths: 0.7 * lengths, alpha=0.5, bounds=(0, 2.2))
    return bk.Posterior(lm, longer, prompts=PROMPTS, max_new_tokens=3)


MODELS = {"gpt2": gpt2, "llama": llama}

ALGORITHMS = {"Exact, enumerated": bk.Exact(), "SMC, always": bk.SMC(100, ess_threshold=1.0, resampling="residual")}
ALGORITHMS |= named(DRAWING, 50)


@functools.cache
def both(name: str) -> tuple[bk.Posterior, bk.Posterior]:
    """The same posterior on torch and on JAX."""
    on_torch = MODELS[name]()
    on_jax = bk.Posterior(as_jax(on_torch.prior), on_torch.likelihood, prompts=PROMPTS, max_new_tokens=3)
    return on_torch, on_jax


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_enumerated_posteriors_are_one(model: str) -> None:
    first, second = (Truth(posterior) for posterior in both(model))
    np.testing.assert_allclose(first.log_prior, second.log_prior, rtol=0, atol=1e-5)
    np.testing.assert_allclose(first.log_evidence, second.log_evidence, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(second.log_prior).sum(axis=1), 1.0, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, name",
    [("gpt2", name) for name in ALGORITHMS] + [pytest.param("llama", "SMC, always", marks=pytest.mark.slow)],
)
def test_the_same_seed_gives_the_same_draws_on_both(model: str, name: str) -> None:
    """Uniforms come from the host, so that only a rounding at the edge of a token's interval could tell them apart."""
    on_torch, on_jax = both(model)
    first, second = (ALGORITHMS[name].run(posterior, seed=3) for posterior in (on_torch, on_jax))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_array_equal(first.reward, second.reward)
    fields = ["log_prior", "log_likelihood", "log_proposal", "log_weights", "log_evidence", "elbo"]
    if name != "SuffixMH":  # its ESS is of ranks, and rounding orders equal log-probs
        fields.append("ess")
    for field in fields:
        np.testing.assert_allclose(getattr(first, field), getattr(second, field), rtol=1e-4, atol=1e-4, err_msg=field)
    other = ALGORITHMS[name].run(on_jax, seed=4)
    assert name == "Exact, enumerated" or not np.array_equal(other.tokens, second.tokens)
    again = ALGORITHMS[name].run(on_jax, seed=3)
    np.testing.assert_array_equal(again.log_weights, second.log_weights)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_log_evidence_is_the_truth_within_standard_errors(model: str) -> None:
    for posterior in both(model):
        truth = Truth(posterior)
        for algorithm in (bk.ImportanceSampling(4000), bk.SMC(4000)):
            draws = algorithm.run(posterior, seed=1)
            assert (np.abs(draws.log_evidence - truth.log_evidence) < 3.5 * draws.log_evidence_se).all()


def test_certificate_frontier_and_comparison_agree() -> None:
    on_torch, on_jax = both("gpt2")
    first, second = (bk.certify(p, p.prior, seed=0) for p in (on_torch, on_jax))
    assert first.grade == second.grade == "A"
    for interval in ("elbo", "log_evidence_bounds", "reverse_kl", "forward_kl"):
        np.testing.assert_allclose(getattr(first, interval), getattr(second, interval), rtol=0, atol=1e-4)
    curves = [bk.frontier(p, num_draws=1000, seed=0) for p in (on_torch, on_jax)]
    assert curves[0].alpha_for(kl=0.3) == pytest.approx(curves[1].alpha_for(kl=0.3), rel=1e-4)
    result = bk.compare(on_jax, {"exact": bk.Exact(), "SMC": bk.SMC(100)}, seed=0)
    assert not result.failures


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_hidden_states_as_features_agree(model: str) -> None:
    """What a reward model reads: the state after the last token, EOS left out."""
    on_torch, on_jax = both(model)
    x = bk.ImportanceSampling(40).run(on_torch, seed=0).sequences
    first, second = (bk.HiddenStates(p.prior)(posterior_batch(p, x)) for p in (on_torch, on_jax))
    assert first.shape[0] == 80
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_models_say_what_they_are() -> None:
    on_torch, on_jax = both("llama")
    assert repr(on_torch.prior) == "TorchLM(LlamaForCausalLM, V=5)"
    assert repr(on_jax.prior) == "JaxLM(llama, 2 x 16, V=5)"
