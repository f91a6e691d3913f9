"""SVI end to end: it reaches the posterior, leaves the world as it found it, and keeps what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.backends import ngram_of
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior

HISTORY = {"elbo", "reward", "kl", "log_weight_sd", "gradient_norm", "learning_rate", "seconds"}


@pytest.fixture(scope="module", params=["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> str:
    """What trains: a table of logits is a torch module in Pyro, or a pytree in NumPyro."""
    return str(request.param)


def trained_by(engine: str, posterior: bk.Posterior) -> bk.Posterior:
    """The posterior with its table on the engine's backend, the reward called on the host."""
    if engine == "pyro":
        return posterior
    likelihood = posterior.likelihood
    if isinstance(likelihood, bk.TokenReward):
        likelihood = bk.TokenReward(likelihood.fn, alpha=likelihood.alpha, callback=True)
    prompts = [list(prompt) for prompt in posterior.prompt_ids]
    prior = JaxTable(ngram_of(posterior.prior))
    return bk.Posterior(prior, likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)


def exactly(engine: str, tolerance: float) -> float:
    """Pyro's table is of float64; NumPyro's of float32."""
    return tolerance if engine == "pyro" else 1e-5


def policy(guide: Any) -> bk.NgramLM:
    """A trained table, whichever way, as an `NgramLM`."""
    found: bk.NgramLM = guide if isinstance(guide, bk.NgramLM) else guide.to_ngram()
    return found


def tabular_problem(engine: str = "pyro", prompts: Any = ((),)) -> bk.Posterior:
    """Forty completions, 1.27 nats from prior to posterior (for the empty prompt), every prefix a row of the table."""
    base = random_posterior(51, num_tokens=3)
    order = 3 + max(map(len, prompts))
    listed = [list(p) for p in prompts]
    table = bk.Posterior(full_table(base.prior, order), base.likelihood, prompts=listed, max_new_tokens=3)
    return trained_by(engine, table)


def small_task(**options: Any) -> bk.Posterior:
    settings = {"vocab_size": 5, "max_new_tokens": 3, "hidden": 32, "layers": 1, "target_kl": 1.0}
    return problems.random_gpt2_task(4, **(settings | options))


# --- the answer is right ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tabular_fit(engine: str) -> bk.Fit:
    return bk.SVI(500, num_particles=32, learning_rate=0.1).fit(tabular_problem(engine), seed=0)


@pytest.mark.slow
def test_a_table_reaches_the_posterior(engine: str, tabular_fit: bk.Fit) -> None:
    """As theory.md 2.5 asks for: 500 steps are enough."""
    truth = Truth(tabular_fit.posterior)
    assert len(truth.xs) == 40
    assert truth.kl(tabular_fit.posterior.prior)[0] > 1
    assert isinstance(tabular_fit.guide, bk.NgramLM if engine == "pyro" else JaxTable)
    guide = policy(tabular_fit.guide)
    assert truth.kl(guide)[0] < 1e-4
    np.testing.assert_allclose(np.exp(guide.log_probs).sum(axis=-1), 1.0, atol=exactly(engine, 1e-12))


@pytest.mark.slow
def test_history_says_what_happened(engine: str, tabular_fit: bk.Fit) -> None:
    history, truth = tabular_fit.history, Truth(tabular_fit.posterior)
    assert set(history) >= HISTORY
    assert {len(values) for values in history.values()} == {500}
    expected = history["reward"] / tabular_fit.posterior.alpha - history["kl"]
    np.testing.assert_allclose(history["elbo"], expected, rtol=0, atol=exactly(engine, 1e-9))
    assert history["elbo"][:10].mean() < truth.log_evidence[0] - 0.5
    assert history["elbo"][-1] == pytest.approx(truth.log_evidence[0], abs=0.02)
    assert history["log_weight_sd"][-1] < 0.1 < history["log_weight_sd"][0]
    assert (np.diff(history["seconds"]) > 0).all()
    rates = history["learning_rate"]
    assert rates.max() == pytest.approx(0.1)
    assert rates.argmax() < 50
    assert rates[-1] < 0.001
    assert not tabular_fit.interrupted
    assert 1 < tabular_fit.training_tokens / (500 * 32 * 3) < 3  # tokens a completion; one draw and two scores of it
    assert tabular_fit.seconds >= history["seconds"][-1]


def test_draws_of_a_fit_follow_its_guide(engine: str, tabular_fit: bk.Fit) -> None:
    posterior = tabular_fit.posterior
    truth, draws = Truth(posterior), tabular_fit.run(3000, seed=1)
    of_guide = bk.Posterior(policy(tabular_fit.guide), posterior.likelihood, max_new_tokens=3)
    assert chi_square_p(counts(truth, draws.tokens[0]), np.exp(of_guide.log_prior(truth.sequences)[0])) > 0.001
    np.testing.assert_allclose(draws.log_proposal, of_guide.log_prior(draws), rtol=0, atol=exactly(engine, 1e-12))
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=exactly(engine, 1e-12))
    np.testing.assert_array_equal(draws.log_weights, 0.0)
    assert np.isnan(draws.log_evidence).all()
    assert draws.elbo[0] == pytest.approx(truth.log_evidence[0], abs=1e-3)
    assert draws.guide is tabular_fit.guide
    assert draws.cost.training_tokens == tabular_fit.training_tokens
    corrected = bk.ImportanceSampling(1000, proposal=tabular_fit.guide).run(posterior, seed=0)
    assert corrected.ess[0] > 990
    assert corrected.log_evidence[0] == pytest.approx(truth.log_evidence[0], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"estimator": "rao_blackwell"}, {"prompts_per_step": 1}], ids=str)
def test_other_ways_to_the_same_posterior(engine: str, options: dict[str, Any]) -> None:
    posterior = tabular_problem(engine, prompts=((0,), (1,)))
    truth = Truth(posterior)
    fit = bk.SVI(250, num_particles=32, learning_rate=0.15, **options).fit(posterior, seed=1)
    before, after = truth.kl(posterior.prior), truth.kl(policy(fit.guide))
    assert (before > 0.5).all()
    assert (after < 0.03).all()


@pytest.mark.slow
def test_a_transformer_reaches_the_posterior() -> None:
    """A small version of the tasks in benchmarks/, which run at full length there."""
    posterior = small_task()
    truth = Truth(posterior)
    fit = bk.SVI(90, num_particles=64, learning_rate=1e-2).fit(posterior, seed=0)
    assert truth.kl(posterior.prior)[0] > 1
    assert 0 <= truth.kl(fit.guide)[0] < 0.03
    corrected = bk.ImportanceSampling(500, proposal=fit.guide).run(posterior, seed=2)
    assert corrected.ess[0] > 450


@pytest.mark.slow
def test_it_gets_stuck_where_the_optimum_is_outside_the_family() -> None:
    """A bigram guide cannot hold the posterior of a reward with a memory: it ends near the best bigram, not at p*."""
    posterior = problems.gold_posterior(max_new_tokens=4)
    truth = Truth(posterior)
    fit = bk.SVI(200, num_particles=64, learning_rate=0.1).fit(posterior, seed=0)
    assert 0.005 < truth.kl(fit.guide)[0] < truth.kl(posterior.prior)[0]
    assert fit.guide.order == 2


# --- it leaves the world as it was -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_fit_and_nothing_global_moves() -> None:
    posterior = small_task(hidden=16)
    svi = bk.SVI(3, num_particles=8)
    before = {name: value.clone() for name, value in posterior.prior.module.state_dict().items()}
    pyro.clear_param_store()
    kept = pyro.param("users_own", torch.tensor(1.5))
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = svi.fit(posterior, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["users_own"]
    assert pyro.param("users_own") is kept or torch.equal(pyro.param("users_own"), kept)
    pyro.clear_param_store()
    torch.manual_seed(8)
    again, other = svi.fit(posterior, seed=3), svi.fit(posterior, seed=4)
    for name in HISTORY - {"seconds"}:
        np.testing.assert_array_equal(first.history[name], again.history[name])
    for name, value in first.guide.module.state_dict().items():
        assert torch.equal(value, again.guide.module.state_dict()[name])
    assert not np.array_equal(first.history["elbo"], other.history["elbo"])
    for name, value in posterior.prior.module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
def test_lora_trains_its_adapters_and_nothing_else() -> None:
    pytest.importorskip("peft")
    posterior = small_task()
    prior, truth = posterior.prior, Truth(posterior)
    before = {name: value.clone() for name, value in prior.module.named_parameters()}
    flags = {name: value.requires_grad for name, value in prior.module.named_parameters()}
    modules = {name: type(module) for name, module in prior.module.named_modules()}
    fit = bk.SVI(80, num_particles=64, learning_rate=2e-2, adapter="lora").fit(posterior, seed=0)
    assert truth.kl(fit.guide)[0] < 0.5 * truth.kl(prior)[0]
    assert {name: value.requires_grad for name, value in prior.module.named_parameters()} == flags
    assert {name: type(module) for name, module in prior.module.named_modules()} == modules
    for name, value in prior.module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
    trained = sum(parameter.numel() for parameter in fit.guide.parameters())
    assert 0 < trained < sum(parameter.numel() for parameter in prior.module.parameters())
    np.testing.assert_array_equal(posterior.log_prior(truth.sequences), truth.log_prior)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_saved_fit_is_a_hugging_face_folder(adapter: str | None, tmp_path: Path) -> None:
    if adapter:
        pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    posterior = small_task(hidden=16)
    truth = Truth(posterior)
    fit = bk.SVI(10, num_particles=16, learning_rate=2e-2, adapter=adapter).fit(posterior, seed=0)
    folder = fit.save(tmp_path / "policy")
    assert folder == tmp_path / "policy"
    ours = bk.Posterior(
        fit.guide, posterior.likelihood, prompts=[list(posterior.prompt_ids[0])], max_new_tokens=3
    ).log_prior(truth.sequences)[0]
    assert np.abs(ours - truth.log_prior[0]).max() > 0.01
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not any("lora" in name for name, _ in model.named_parameters())
    prompt = list(posterior.prompt_ids[0])
    with torch.no_grad():
        for x, expected in list(zip(truth.xs, ours, strict=True))[::7]:
            logits = model(torch.tensor([[*prompt, *x]])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(x) - 1)
            total = sum(float(logits[place, token]) for place, token in zip(places, x, strict=True))
            assert total == pytest.approx(expected, abs=1e-4)
    again = bk.TorchLM.from_pretrained(folder)
    assert again.eos_token_ids == fit.guide.eos_token_ids
    reread = bk.Posterior(again, posterior.likelihood, prompts=[prompt], max_new_tokens=3).log_prior(truth.sequences)
    np.testing.assert_allclose(reread[0], ours, rtol=0, atol=1e-5)


def test_a_saved_table_is_read_again(tmp_path: Path) -> None:
    fit = bk.SVI(3, num_particles=8).fit(tabular_problem(), seed=0)
    again = bk.NgramLM.from_pretrained(fit.save(tmp_path / "table"))
    np.testing.assert_array_equal(again.log_probs, policy(fit.guide).log_probs)


# --- what can go wrong ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_constraint_is_refused_with_the_completion_and_the_cure(engine: str) -> None:
    prior = bk.NgramLM.fit(["abba", "baab", "aab"], order=2)
    no_bb = bk.Constraint(lambda completions: ["bb" not in c for c in completions])
    posterior = trained_by(engine, bk.Posterior(prior, no_bb, max_new_tokens=5))
    with pytest.raises(bk.UnboundedLossError, match=r"the completion '[ab]*bb[ab]*' \(ids \[.*eps.*bk\.SMC"):
        bk.SVI(10).fit(posterior, seed=0)
    relaxed = bk.Reward(lambda completions: [np.log(1e-3) if "bb" in c else 0.0 for c in completions], alpha=1.0)
    posterior = trained_by(engine, bk.Posterior(prior, relaxed, max_new_tokens=5))
    fit = bk.SVI(100, num_particles=32, learning_rate=0.1).fit(posterior, seed=0)
    texts = fit.run(500, seed=0).texts()[0]
    assert sum("bb" in text for text in texts) < 10


class Interrupting:
    """A reward during whose k-th call the user presses Ctrl-C."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return 2.0 * (tokens == 0).sum(axis=1)


def test_ctrl_c_keeps_what_was_learned(engine: str, tmp_path: Path) -> None:
    prior = tabular_problem().prior

    def posterior(call: int) -> bk.Posterior:
        reward = bk.TokenReward(Interrupting(call), alpha=1.0)
        return trained_by(engine, bk.Posterior(prior, reward, max_new_tokens=3))

    svi = bk.SVI(50, num_particles=16, learning_rate=0.1)
    with pytest.warns(UserWarning, match=r"interrupted after 7 steps.*fit\.guide.*fit\.save"):
        fit = svi.fit(posterior(8), seed=0)
    assert fit.interrupted
    assert {len(values) for values in fit.history.values()} == {7}
    whole = svi.fit(posterior(-1), seed=0)
    np.testing.assert_array_equal(whole.history["elbo"][:7], fit.history["elbo"])
    assert np.abs(policy(fit.guide).log_probs - prior.log_probs).max() > 0.01
    assert np.isfinite(fit.run(10, seed=0).elbo).all()
    if engine == "pyro":  # a JaxTable belongs to the tests and has no file
        assert (fit.save(tmp_path / "fit") / "ngram.npz").exists()
    assert fit.training_tokens > 0


def test_ctrl_c_before_anything_was_learned_is_ctrl_c(engine: str) -> None:
    posterior = bk.Posterior(tabular_problem().prior, bk.TokenReward(Interrupting(1), alpha=1.0), max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        bk.SVI(50).fit(trained_by(engine, posterior), seed=0)


def test_a_prior_that_cannot_be_trained_is_refused() -> None:
    class Frozen:
        vocab_size, full_support, tokenizer, accepts_empty_prompt = 2, True, None, True
        eos_token_ids = frozenset({1})

        def encode(self, texts: Any) -> Any:
            return [[] for _ in texts]

        def __getattr__(self, name: str) -> Any:
            if name in {"decode", "prefill", "next_log_probs", "append", "select", "token_log_probs"}:
                return lambda *arguments: None
            raise AttributeError(name)

    reward = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"torch parameters.*Frozen"):
        bk.SVI(2).fit(bk.Posterior(Frozen(), reward, max_new_tokens=2), seed=0)  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match=r"Adapters are for a bk\.TorchLM; the prior is a NgramLM"):
        bk.SVI(2, adapter="lora").fit(tabular_problem(), seed=0)


def test_a_users_torch_model_is_copied_and_trained() -> None:
    """Anything with the protocol and torch parameters, here a logit table, which then stays as it was."""
    posterior = tabular_problem()
    prior = TableLM(posterior.prior)  # type: ignore[arg-type]
    for parameter in prior.parameters():
        parameter.requires_grad_(False)
    users_own = bk.Posterior(prior, posterior.likelihood, max_new_tokens=3)
    before = prior.logits.clone()
    fit = bk.SVI(5, num_particles=16, learning_rate=0.1).fit(users_own, seed=0)
    assert torch.equal(prior.logits, before)
    assert not prior.logits.requires_grad
    assert fit.guide is not prior
    assert fit.history["elbo"].shape == (5,)


def test_a_recipe_with_adapters_can_be_a_key() -> None:
    """A peft configuration has no hash of its own; recipes are keys of dictionaries of fits."""
    peft = pytest.importorskip("peft")
    recipe = bk.SVI(3, adapter=peft.LoraConfig(r=2, target_modules="all-linear"))
    assert {recipe: 1}[recipe] == 1
