"""Bayesian policies over transformers and tables, their files, and what can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.policies import as_policy
from tests.helpers.truth import Truth, full_table, random_posterior
from tests.inference.svi.bayesian.test_bayesian import tiny

# --- language models ------------------------------------------------------------------------------------------


def small_task() -> bk.Posterior:
    return problems.random_gpt2_task(4, vocab_size=5, max_new_tokens=3, hidden=16, layers=1, target_kl=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["lora", "bias", "all"])
def test_transformers_are_tuned_and_left_alone(parameters: str) -> None:
    if parameters == "lora":
        pytest.importorskip("peft")
    posterior = small_task()
    prior, truth = posterior.prior, Truth(posterior)
    before = {name: value.clone() for name, value in prior.module.state_dict().items()}  # type: ignore[attr-defined]
    flags = [value.requires_grad for value in prior.module.parameters()]  # type: ignore[attr-defined]
    pyro.clear_param_store()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rates = {"lora": 2e-2, "bias": 5e-2, "all": 5e-3}
    recipe = bk.BayesianSVI(
        30, 32, 2, parameters=parameters, learning_rate=rates[parameters], prior_scale=0.3, num_predictive=4
    )
    fit = recipe.fit(posterior, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store()
    for name, value in prior.module.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, before[name])
    assert [value.requires_grad for value in prior.module.parameters()] == flags  # type: ignore[attr-defined]
    np.testing.assert_array_equal(posterior.log_prior(truth.sequences), truth.log_prior)
    assert truth.kl(fit.guide)[0] < 0.7 * truth.kl(prior)[0]
    mean_kl = np.mean([truth.kl(policy) for policy in fit.policies])
    assert truth.kl(fit.guide)[0] < mean_kl
    # offset 0 is the prior, a seed is a policy, and policies are models of their own
    assert truth.kl(fit.policy_at(np.zeros(fit.mu.size)))[0] == pytest.approx(truth.kl(prior)[0], abs=1e-6)
    first, other = fit.policy(1), fit.policy(2)
    assert isinstance(first, bk.TorchLM)
    assert truth.kl(first)[0] == truth.kl(fit.policy(1))[0] != truth.kl(other)[0]
    assert truth.kl(fit.policy())[0] == truth.kl(fit.policy_at(fit.mu))[0]
    assert set(fit.history) == {
        *("elbo", "reward", "kl", "policy_kl", "log_weight_sd", "gradient_norm", "learning_rate", "step_kl", "seconds")
    }
    assert {len(values) for values in fit.history.values()} == {30}
    assert fit.evidence_weight == fit.mu.size
    assert fit.training_tokens > 30 * 2 * 32


@pytest.mark.slow
def test_the_same_seed_gives_the_same_policies() -> None:
    posterior, recipe = small_task(), bk.BayesianSVI(3, 8, 2, parameters="bias", num_predictive=2)
    first, again, other = recipe.fit(posterior, seed=3), recipe.fit(posterior, seed=3), recipe.fit(posterior, seed=4)
    np.testing.assert_array_equal(first.mu, again.mu)
    np.testing.assert_array_equal(first.sigma, again.sigma)
    x = Truth(posterior).sequences
    log_probs = [lm.token_log_probs(posterior.prompt_ids, x) for lm in (first.guide, again.guide, other.guide)]
    np.testing.assert_array_equal(log_probs[0], log_probs[1])
    assert not np.array_equal(log_probs[0], log_probs[2])


@pytest.mark.slow
def test_a_table_is_tuned_with_all_its_logits() -> None:
    base = random_posterior(51, num_tokens=2)
    posterior = bk.Posterior(full_table(base.prior, 2), base.likelihood, max_new_tokens=2)  # type: ignore[arg-type]
    truth = Truth(posterior)
    recipe = bk.BayesianSVI(80, 16, 2, parameters="all", prior_scale=1.0, evidence_weight=50.0, num_predictive=6)
    fit = recipe.fit(posterior, seed=0)
    assert all(isinstance(policy, bk.NgramLM) for policy in fit.policies)
    assert truth.kl(fit.guide)[0] < 0.4 * truth.kl(posterior.prior)[0]
    # contexts that are never read keep their prior: only EOS (the start) and the three other tokens are contexts of order 2
    assert fit.sigma.shape == (16,)


@pytest.mark.slow
def test_it_stands_beside_the_others(tmp_path: Path) -> None:
    posterior = small_task()
    truth = Truth(posterior)
    recipe = bk.BayesianSVI(
        40, 16, 2, parameters="bias", learning_rate=5e-2, prior_scale=0.5, num_predictive=3, num_draws=400
    )
    result = bk.compare(posterior, {"exact": bk.Exact(), "Bayesian SVI": recipe, "SVI": bk.SVI(3, 16)}, seed=0)
    row = result.table().loc["Bayesian SVI"]
    assert not row["note"]
    assert row["kl_posterior_sign"] == "="
    assert 0 < row["kl_posterior"] < truth.kl(posterior.prior)[0]
    assert row["training_tokens"] > 0
    fit: Any = result.fits["Bayesian SVI"]
    certificate = bk.certify(posterior, fit, seed=0)
    assert certificate.reverse_kl[0, 0] <= truth.kl(fit.guide)[0] <= certificate.reverse_kl[0, 1]
    corrected = bk.ImportanceSampling(2000, proposal=fit.guide).run(posterior, seed=1)
    assert corrected.log_evidence[0] == pytest.approx(truth.log_evidence[0], abs=4 * corrected.log_evidence_se[0])
    with pytest.raises(bk.BayesKLRLError, match="fit it first"):
        bk.certify(posterior, recipe, seed=0)  # type: ignore[arg-type]
    # one policy is a Hugging Face folder like any other
    fit.policy(5).save_pretrained(tmp_path / "policy")  # type: ignore[attr-defined]
    assert truth.kl(bk.TorchLM.from_pretrained(tmp_path / "policy"))[0] == pytest.approx(
        truth.kl(fit.policy(5))[0], abs=1e-5
    )


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["bias", "all", "lora", "peft"])
def test_saved_policies_are_read_again(parameters: str, tmp_path: Path) -> None:
    chosen: Any = parameters
    if parameters in ("lora", "peft"):
        peft = pytest.importorskip("peft")
        if parameters == "peft":
            chosen = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    posterior = small_task() if parameters != "all" else random_posterior(51, num_tokens=3)
    fit = bk.BayesianSVI(5, 8, 2, parameters=chosen, num_predictive=3).fit(posterior, seed=2)
    again = bk.BayesianFit.load(fit.save(tmp_path / "fit"), posterior)
    x = Truth(posterior).sequences
    np.testing.assert_array_equal(
        again.guide.token_log_probs(posterior.prompt_ids, x), fit.guide.token_log_probs(posterior.prompt_ids, x)
    )
    np.testing.assert_array_equal(again.mu, fit.mu)
    np.testing.assert_array_equal(again.sigma, fit.sigma)
    np.testing.assert_array_equal(again.history["elbo"], fit.history["elbo"])
    assert again.training == fit.training
    assert again.policy_kl == fit.policy_kl
    if parameters != "peft":
        assert again.recipe == fit.recipe
    by_folder = as_policy(tmp_path / "fit", posterior)
    np.testing.assert_array_equal(
        by_folder.token_log_probs(posterior.prompt_ids, x), fit.guide.token_log_probs(posterior.prompt_ids, x)
    )
    other = (
        random_posterior(1, vocab_size=5, eos=(4,))
        if parameters == "all"
        else problems.random_gpt2_task(4, vocab_size=5, max_new_tokens=3, hidden=32, layers=1, target_kl=1.0)
    )
    with pytest.raises(bk.CheckpointError, match=r"not of this prior.*of shape"):
        bk.BayesianFit.load(tmp_path / "fit", other)


def test_a_folder_without_policies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match="does not hold a readable BayesianFit"):
        bk.BayesianFit.load(tmp_path, tiny())
    (tmp_path / "bayesian_fit.json").write_text('{"format": "else"}')
    with pytest.raises(bk.CheckpointError, match="of format 'else'"):
        bk.BayesianFit.load(tmp_path, tiny())


# --- what can go wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_particles": 1},
        {"num_policies": 0},
        {"prior_scale": 0.0},
        {"prior_scale": -1.0},
        {"evidence_weight": 0.0},
        {"initial_scale": 0.0},
        {"learning_rate": -1.0},
        {"max_step_kl": 0.0},
        {"num_predictive": 0},
        {"num_draws": 0},
        {"parameters": "heads"},
    ],
    ids=str,
)
def test_recipes_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(bk.BayesKLRLError, match=name):
        bk.BayesianSVI(**({"num_steps": 5} | options))


def test_parameters_that_the_prior_has_not_are_refused() -> None:
    table = random_posterior(51, num_tokens=3)
    for parameters, message in (("lora", r'Adapters.*NgramLM.*"all"'), ("bias", r'TableLM has no parameters.*"all"')):
        with pytest.raises(bk.BayesKLRLError, match=message):
            bk.BayesianSVI(2, parameters=parameters).fit(table, seed=0)
    from tests.helpers.tiny_models import tiny_llama

    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * lengths, alpha=1.0)
    llama = bk.Posterior(bk.TorchLM(tiny_llama()), reward, prompts=[[1]], max_new_tokens=2)
    with pytest.raises(bk.BayesKLRLError, match=r'no parameters for parameters=\'bias\'.*"lora" or "all"'):
        bk.BayesianSVI(2, parameters="bias").fit(llama, seed=0)
    peft = pytest.importorskip("peft")
    with pytest.raises(bk.BayesKLRLError, match="peft cannot put this adapter"):
        bk.BayesianSVI(2, parameters=peft.LoraConfig(target_modules=["nowhere"])).fit(llama, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="adapter is 'lora' or a peft configuration"):
        bk.BayesianSVI(2, parameters=3).fit(llama, seed=0)
    from tests.helpers.user_models import RecurrentLM

    plain = bk.Posterior(RecurrentLM(), reward, prompts=[[1]], max_new_tokens=2)
    with pytest.raises(bk.BayesKLRLError, match=r"torch parameters.*RecurrentLM"):
        bk.BayesianSVI(2, parameters="all").fit(plain, seed=0)


def test_a_likelihood_of_zero_is_named_and_what_was_learned_is_kept() -> None:
    base = tiny(((0,),))
    calls = []

    def reward(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        calls.append(len(tokens))
        return np.where((tokens[:, 0] == 1) & (len(calls) > 6), -np.inf, 0.0)

    posterior = bk.Posterior(base.prior, bk.TokenReward(reward, alpha=1.0), prompts=[[0]], max_new_tokens=2)
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[1.*eps") as caught:
        bk.BayesianSVI(20, 16, 2, parameters="bias", num_predictive=2).fit(posterior, seed=0)
    assert isinstance(caught.value.fit, bk.BayesianFit)
    assert len(caught.value.fit.history["elbo"]) == 3


def test_ctrl_c_keeps_what_was_learned() -> None:
    base, calls = tiny(((0,),)), []

    def reward(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        calls.append(len(tokens))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return 1.0 * lengths

    posterior = bk.Posterior(base.prior, bk.TokenReward(reward, alpha=1.0), prompts=[[0]], max_new_tokens=2)
    with pytest.warns(UserWarning, match="interrupted after 4 steps"):
        fit = bk.BayesianSVI(20, 16, 2, parameters="bias", num_predictive=2).fit(posterior, seed=0)
    assert fit.interrupted
    assert len(fit.history["elbo"]) == 4
    assert np.isfinite(fit.run(10, seed=0).elbo).all()


@pytest.mark.slow
def test_a_bayesian_policy_is_a_proposal_and_is_fitted_once_in_a_comparison() -> None:
    base = random_posterior(51, num_tokens=3)
    posterior = bk.Posterior(full_table(base.prior, 3), base.likelihood, max_new_tokens=3)
    recipe = bk.BayesianSVI(60, 16, 2, parameters="all", prior_scale=1.0, evidence_weight=200.0, num_draws=50)
    result = bk.compare(
        posterior,
        {"exact": bk.Exact(), "policy": recipe, "then IS": bk.ImportanceSampling(4000, proposal=recipe)},
        seed=0,
    )
    assert not result.failures
    assert len(result.fits) == 1
    corrected = result["then IS"]
    assert corrected.training_tokens == result["policy"].training_tokens > 0
    assert abs(corrected.log_evidence - Truth(posterior).log_evidence)[0] < 4 * corrected.log_evidence_se[0]
