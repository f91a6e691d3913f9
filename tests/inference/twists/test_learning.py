"""Learned twists: the contrastive loss has gradient 0 at the optimal twist, and what is learned tightens the bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.inference.twists.losses import ctl_loss
from bayes_klrl.models.twists.neural import LMFeatures, RecurrentFeatures
from tests.helpers.tiny_models import tiny_gpt2, tiny_other
from tests.helpers.truth import Truth, full_table, random_posterior, repeated, z_score
from tests.helpers.user_models import RecurrentLM
from tests.models.twists.test_twists import counter_posterior


class Tables:
    """Every quantity of the loss on the enumerated completions, and log psi as a table with one entry per prefix."""

    def __init__(self, posterior: bk.Posterior, proposal: bk.LanguageModel | None = None) -> None:
        self.truth = truth = Truth(posterior)
        tokens, self.lengths = truth.sequences.tokens, truth.sequences.lengths
        self.inside = torch.as_tensor(truth.sequences.mask)
        prefixes = [[[(p, *x[: t + 1]) for t in range(len(x))] for x in truth.xs] for p in range(posterior.num_prompts)]
        names = sorted({prefix for one in prefixes for x in one for prefix in x})
        number = {prefix: i for i, prefix in enumerate(names)}
        complete = {
            (p, *x): truth.reward[p, n] / posterior.alpha for p in range(len(prefixes)) for n, x in enumerate(truth.xs)
        }
        best = [complete[name] if name in complete else truth.log_psi(name[0], name[1:]) for name in names]
        self.optimum = torch.tensor(best, dtype=torch.float64)
        width = posterior.max_new_tokens
        self.index = torch.tensor(
            [[[number[x[min(t, len(x) - 1)]] for t in range(width)] for x in one] for one in prefixes]
        )
        self.log_likelihood = torch.as_tensor(truth.reward / posterior.alpha)
        self.log_prior = torch.as_tensor(self.cumulated(posterior.prior, posterior))
        drawn_from = posterior.prior if proposal is None else proposal
        self.log_proposal = torch.as_tensor(self.cumulated(drawn_from, posterior))
        self.log_base = self.log_proposal[..., -1]
        assert tokens.shape == self.inside.shape

    def cumulated(self, lm: bk.LanguageModel, posterior: bk.Posterior) -> np.ndarray:
        return np.asarray(lm.token_log_probs(posterior.prompt_ids, self.truth.sequences)).cumsum(axis=2)

    def gradient(self, table: torch.Tensor) -> torch.Tensor:
        table = table.clone().requires_grad_()
        value = ctl_loss(
            table[self.index], self.log_prior, self.log_proposal, self.log_likelihood, self.inside, self.log_base
        )
        return torch.autograd.grad(value, table)[0]


POSTERIORS: dict[str, dict[str, Any]] = {
    "lopsided": {"seed": 11, "num_tokens": 4},
    "early EOS, two prompts": {
        "seed": 12, "num_tokens": 4, "vocab_size": 3, "eos": (2,), "eos_logit": 1.0, "prompts": ((0,), (1,))
    },
    "no EOS": {"seed": 13, "num_tokens": 4, "eos": ()},
}  # fmt: skip


@pytest.mark.parametrize("problem", POSTERIORS)
def test_the_loss_is_stationary_at_the_optimal_twist(problem: str) -> None:
    """theory.md 3.8: exact expectations, one parameter per prefix; and nowhere else nearby."""
    posterior = random_posterior(**POSTERIORS[problem])
    tables = Tables(posterior, full_table(posterior.prior, 3, noise=0.8, seed=3))
    assert tables.gradient(tables.optimum).abs().max() < 1e-8
    off = tables.optimum + 0.1 * torch.randn(tables.optimum.shape, generator=torch.Generator().manual_seed(0)).double()
    assert tables.gradient(off).abs().max() > 1e-4


def test_contrastive_learning_needs_the_density_of_its_draws() -> None:
    """The mistake that the test above must see."""
    posterior = random_posterior(**POSTERIORS["lopsided"])
    elsewhere = Tables(posterior, full_table(posterior.prior, 3, noise=0.8, seed=3))
    elsewhere.log_proposal = elsewhere.log_prior
    assert elsewhere.gradient(elsewhere.optimum).abs().max() > 1e-3


def test_contrastive_learning_leaves_a_constant_of_each_step_open() -> None:
    posterior = random_posterior(**POSTERIORS["lopsided"])
    tables = Tables(posterior)
    steps = torch.zeros_like(tables.optimum)
    steps[tables.index[tables.inside]] = torch.where(tables.inside, torch.arange(4.0), 0.0)[tables.inside].double()
    assert tables.gradient(tables.optimum + steps).abs().max() < 1e-8


def test_draws_of_likelihood_zero_leave_the_contrast_finite() -> None:
    posterior = random_posterior(**POSTERIORS["lopsided"])
    tables = Tables(posterior)
    tables.log_likelihood = torch.where(tables.log_likelihood > 1.0, tables.log_likelihood, -torch.inf)
    assert tables.gradient(tables.optimum).isfinite().all()
    tables.log_likelihood = torch.full_like(tables.log_likelihood, -torch.inf)
    assert tables.gradient(tables.optimum).isfinite().all()


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_learned_is_near_the_optimal_twist() -> None:
    """Early EOS, so that the scale matters too: log psi of unfinished prefixes, weighted by how often they are met."""
    posterior = random_posterior(11, num_tokens=4, order=2)
    truth = Truth(posterior)
    recipe = bk.LearnedTwist(150, num_draws=64, learning_rate=1e-2, hidden=24)
    twist = recipe.fit(posterior, seed=0)
    assert twist.history.shape == (150,)
    assert twist.training.training_tokens > 1000
    assert abs(twist.log_evidence[0] - truth.log_evidence[0]) < 0.3
    draws = bk.Exact().run(posterior, seed=0)
    for t in (1, 2, 3):
        chosen = draws.lengths[0] > t
        weights = np.exp(draws.log_prior[0, chosen])
        prefixes = draws.tokens[0, chosen, :t]
        learned = twist(posterior, np.zeros(len(prefixes), dtype=np.int64), prefixes)
        optimal = np.array([truth.log_psi(0, prefix) for prefix in prefixes.tolist()])
        error, constant = learned - optimal, truth.log_evidence[0] - optimal
        assert weights @ error**2 < 0.35 * (weights @ constant**2)
        # the scale: E_p0[psi] over unfinished prefixes is that of the likelihood
        ratio = (weights @ np.exp(learned)) / (weights @ np.exp(optimal))
        assert abs(np.log(ratio)) < 0.3


@pytest.mark.slow
def test_learned_twists_tighten_the_bound_where_nothing_else_sees_the_end() -> None:
    """A counter modulo 3 over 8 tokens (P5, shorter): unbiased, and most of the gap to log Z is gone."""
    posterior = counter_posterior(3, 8)
    many = counter_posterior(3, 8, num_runs=200)
    exact = backward_messages(posterior).log_evidence[0]
    twist = bk.LearnedTwist(80, num_draws=128, learning_rate=1e-2).fit(posterior, seed=0)
    plain = bk.SMC(8).run(many, seed=1).log_evidence - exact
    steered = bk.SMC(8, twist=twist, proposal="twisted").run(many, seed=1).log_evidence - exact
    assert abs(z_score(np.exp(steered), 1.0)) < 3
    assert plain.mean() < -0.15
    assert steered.mean() > 0.25 * plain.mean()
    assert steered.std() < 0.5 * plain.std()


@pytest.mark.slow
def test_learned_twists_tighten_the_bound_on_p5() -> None:
    """P5 of theory.md 8.5, m = 5 and T = 20, K = 8: log Z = 6.324288."""
    many = counter_posterior(5, 20, num_runs=200)
    twist = bk.LearnedTwist(100, num_draws=256, learning_rate=1e-2).fit(counter_posterior(5, 20), seed=0)
    plain = bk.SMC(8).run(many, seed=1).log_evidence - 6.324288
    steered = bk.SMC(8, twist=twist, proposal="twisted").run(many, seed=1).log_evidence - 6.324288
    assert plain.mean() < -0.5
    assert steered.mean() > 0.5 * plain.mean()


@pytest.mark.slow
def test_training_is_reproducible_and_leaves_torch_alone() -> None:
    posterior = counter_posterior(3, 5)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (bk.LearnedTwist(3, num_draws=8).fit(posterior, seed=5) for _ in range(2))
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(first.history, second.history)
    draws = bk.SMC(16, twist=bk.LearnedTwist(3, num_draws=8)).run(posterior, seed=5)
    same = bk.SMC(16, twist=first).run(posterior, seed=5)
    np.testing.assert_array_equal(draws.log_weights, same.log_weights)
    assert draws.cost.training_tokens == first.training.training_tokens


# --- priors with hidden states --------------------------------------------------------------------------------------


def neural_posterior(prior: Any = None, eos: int = 0) -> bk.Posterior:
    prior = bk.TorchLM(tiny_gpt2(5, eos)) if prior is None else prior
    reward = bk.TokenReward(
        lambda tokens, lengths: ((tokens == 3) & (np.arange(tokens.shape[1]) < lengths[:, None])).sum(axis=1) % 2.0,
        alpha=0.2,
        bounds=(0, 1),
    )
    return bk.Posterior(prior, reward, prompts=[[1, 2], [3]], max_new_tokens=5)


@pytest.mark.slow
def test_hidden_states_of_a_transformer() -> None:
    posterior = neural_posterior()
    truth = Truth(posterior).log_evidence
    twist = bk.LearnedTwist(60, num_draws=64, learning_rate=1e-2, hidden=32).fit(posterior, seed=0)
    assert isinstance(twist.features, LMFeatures)
    many = bk.Posterior(posterior.prior, posterior.likelihood, prompts=[[1, 2], [3]] * 100, max_new_tokens=5)
    for options in ({"proposal": "twisted"}, {}):
        log_evidence = bk.SMC(6, twist=twist, **options).run(many, seed=1).log_evidence.reshape(100, 2) - truth
        plain = bk.SMC(6).run(many, seed=1).log_evidence.reshape(100, 2) - truth
        for p in range(2):
            assert abs(z_score(np.exp(log_evidence[:, p]), 1.0)) < 3
        if options:
            assert log_evidence.mean() > plain.mean()


def test_features_step_by_step_are_features_all_at_once() -> None:
    sequences = bk.Sequences(np.array([[[1, 2, 3], [4, 0, 0]], [[2, 2, 1], [3, 1, 4]]]), np.array([[3, 2], [3, 3]]))
    prompts = [[1, 2], [3]]
    torch.manual_seed(0)
    for features in (
        LMFeatures(bk.TorchLM(tiny_gpt2(5, 0))),
        LMFeatures(bk.TorchLM(tiny_other("opt"))),
        RecurrentFeatures(5, 7),
    ):
        with torch.no_grad():
            everywhere = features.everywhere(prompts, sequences)
            state = features.select(features.prefill(prompts), np.array([0, 0, 1, 1]))
            for t in range(3):
                here = features.of_state(state).reshape(2, 2, -1)
                inside = torch.as_tensor(sequences.mask[..., t])
                torch.testing.assert_close(here[inside], everywhere[:, :, t][inside], rtol=0, atol=1e-5)
                state = features.append(state, sequences.tokens[..., t].ravel())
        assert everywhere.shape == (2, 2, 3, features.width)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "recurrent network"])
def test_what_a_twist_remembers_does_not_change_what_it_says(kind: str) -> None:
    """In lockstep, out of order, with the prior's state, from the start: the same log psi."""
    posterior = neural_posterior() if kind == "transformer" else counter_posterior(3, 5)
    twist = bk.LearnedTwist(3, num_draws=16, learning_rate=0.1).fit(posterior, seed=0)
    rng = np.random.default_rng(0)
    index = rng.integers(posterior.num_prompts, size=30)
    tokens = rng.integers(0, 3, size=(30, 4)) + (kind == "transformer")  # never EOS

    def fresh(index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return replace(twist)(posterior, index, prefixes)

    expected = [fresh(index, tokens[:, :t]) for t in range(5)]
    for t in (0, 1, 2, 3, 4, 2, 4, 1):
        order = rng.permutation(30)[:17]
        np.testing.assert_allclose(twist(posterior, index[order], tokens[order, :t]), expected[t][order], atol=1e-5)
    prior, state = posterior.prior, posterior.prior.prefill(posterior.prompt_ids)
    state = prior.select(state, index)
    for t in range(4):
        ahead = twist.next_log_psi(posterior, index, tokens[:, :t], (state, np.arange(30)))
        np.testing.assert_allclose(ahead[np.arange(30), tokens[:, t]], expected[t + 1], atol=1e-5)
        state = prior.append(state, tokens[:, t])


@pytest.mark.slow
def test_a_twisted_transformer_is_read_once() -> None:
    """With the prior's own state at hand, the twist reads nothing; without, every prefix once."""
    posterior = neural_posterior()
    twist = bk.LearnedTwist(2, num_draws=8).fit(posterior, seed=0)
    before = twist.model_tokens
    draws = bk.SMC(20, twist=twist, proposal="twisted").run(posterior, seed=0)
    assert twist.model_tokens == before
    alone = bk.SMC(20, twist=twist).run(posterior, seed=0)
    read = twist.model_tokens - before
    assert 0 < read <= alone.cost.model_tokens / 2 + 20
    assert alone.cost.model_tokens > draws.cost.model_tokens


@pytest.mark.slow
def test_priors_that_only_step_are_twisted_too() -> None:
    prior = RecurrentLM(4, (3,), seed=2)
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 0).sum(axis=1), alpha=0.5, bounds=(0, 4))
    posterior = bk.Posterior(prior, reward, prompts=[[0]], max_new_tokens=4)
    truth = Truth(posterior).log_evidence[0]
    twist = bk.LearnedTwist(40, num_draws=32, learning_rate=1e-2, hidden=16).fit(posterior, seed=0)
    draws = bk.SMC(6, twist=twist, proposal="twisted").run(repeated(posterior, 200), seed=0)
    assert abs(z_score(np.exp(draws.log_evidence - truth), 1.0)) < 3


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_refusals_name_the_cure() -> None:
    posterior = random_posterior(11, num_tokens=3)
    hard = bk.Posterior(
        posterior.prior,
        bk.Constraint(lambda completion_ids: [0 in ids for ids in completion_ids]),
        prompts=[[]],
        max_new_tokens=3,
    )
    twist = bk.LearnedTwist(2, num_draws=8).fit(hard, seed=0)
    assert np.isfinite(twist.next_log_psi(hard, np.zeros(1, int), np.array([[1]]))).all()
    for bad in ({"num_draws": 7}, {"num_draws": 0}, {"learning_rate": 0.0}, {"hidden": 0}):
        with pytest.raises(bk.BayesKLRLError):
            bk.LearnedTwist(5, **bad)
    twist = bk.LearnedTwist(1, num_draws=8).fit(posterior, seed=0)
    longer = bk.Posterior(posterior.prior, posterior.likelihood, prompts=[[]], max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="max_new_tokens = 3"):
        bk.SMC(4, twist=twist).run(longer, seed=0)
