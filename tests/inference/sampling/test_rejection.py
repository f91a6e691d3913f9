"""Rejection and quasi-rejection against enumeration, best-of-n's order statistics, budgets and blocks."""

from __future__ import annotations

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.sampling import accept_reject as accept_reject_module
from bayes_klrl.inference.sampling.order_statistics import (
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_log_probs,
    best_of_n_win_rate,
)
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior, repeated, z_score


def bounded(posterior: bk.Posterior, slack: float = 0.0) -> bk.Posterior:
    """The same posterior with the range of its reward declared, `slack` too high."""
    reward = Truth(posterior).reward
    factor = posterior.likelihood
    likelihood = bk.TokenReward(
        factor.fn,  # type: ignore[attr-defined]
        alpha=posterior.alpha,
        bounds=(reward.min() - 1e-9, reward.max() + slack + 1e-9),
    )
    prompts = [list(ids) for ids in posterior.prompt_ids]
    return bk.Posterior(posterior.prior, likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)


# --- rejection -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_prompts_and_early_ends_follow_their_posteriors(backend: str) -> None:
    base = on(
        backend, random_posterior(31, num_tokens=4, eos_logit=1.0, prompts=((0,), (1, 2)), prompt_shift=-1.0, alpha=0.8)
    )
    posterior = bounded(base)
    truth = Truth(posterior)
    draws = bk.RejectionSampling(1500, max_proposals=10**6).run(posterior, seed=0)
    for p in range(2):
        assert chi_square_p(counts(truth, draws.tokens[p]), truth.p[p]) > 0.001
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_array_equal(draws.reward, posterior.reward(draws))
    np.testing.assert_array_equal(draws.log_weights, 0.0)
    assert np.isnan(draws.log_evidence).all()
    assert np.isnan(draws.log_proposal).all()


@pytest.mark.slow
@pytest.mark.usefixtures("large_blocks")
def test_stopping_at_the_last_acceptance_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks, the first and the last accepted draw of many runs both follow the posterior."""
    base = bounded(random_posterior(32, num_tokens=3, prompts=((1,),), alpha=1.0))
    truth = Truth(base)
    for rows, runs in ((1, 200), (4096, 1000), (10**7, 1000)):
        monkeypatch.setattr(accept_reject_module, "_MAX_ROWS", rows)
        draws = bk.RejectionSampling(3).run(repeated(base, runs), seed=1)
        for place in (0, 2):
            assert chi_square_p(counts(truth, draws.tokens[:, place]), truth.p[0]) > 0.001


@pytest.mark.usefixtures("large_blocks")
@crossed(slack=[0.3, 0.0])
def test_the_cost_and_the_evidence_are_what_they_should_be(backend: str, slack: float) -> None:
    """E[proposals] = N exp(r_max / alpha) / Z, and (N - 1) / (proposals - 1) is unbiased; N / proposals is not."""
    base = bounded(on(backend, random_posterior(34, num_tokens=3, prompts=((1,),), alpha=1.0)), slack)
    log_evidence, num = Truth(base).log_evidence[0], 3
    log_bound = base.likelihood.bounds[1] / base.alpha  # type: ignore[index]
    info = bk.RejectionSampling(num).run(repeated(base, 1000), seed=2).info
    assert abs(z_score(info["num_proposals"] * 1.0, num * np.exp(log_bound - log_evidence))) < 3
    assert abs(z_score(np.exp(info["log_evidence_estimate"] - log_evidence), 1.0)) < 3
    naive = num / info["num_proposals"] * np.exp(log_bound - log_evidence)
    assert z_score(naive, 1.0) > 10
    many = bk.RejectionSampling(4000).run(base, seed=0).info
    assert many["acceptance_rate"][0] == pytest.approx(np.exp(log_evidence - log_bound), rel=0.05)
    assert np.isnan(bk.RejectionSampling(1).run(base, seed=0).info["log_evidence_estimate"]).all()


def test_constraints_multiply_in() -> None:
    def starts_with_0(completion_ids: list[list[int]]) -> list[bool]:
        return [ids[0] == 0 for ids in completion_ids]

    base = bounded(random_posterior(33, num_tokens=4))
    posterior = bk.Posterior(base.prior, base.likelihood * bk.Constraint(starts_with_0), prompts=[[]], max_new_tokens=4)
    truth = Truth(posterior)
    draws = bk.RejectionSampling(2000).run(posterior, seed=0)
    assert (draws.tokens[..., 0] == 0).all()
    assert chi_square_p(counts(truth, draws.tokens[0]), truth.p[0]) > 0.001
    alone = bk.Posterior(base.prior, bk.Constraint(starts_with_0), prompts=[[]], max_new_tokens=4)
    info = bk.RejectionSampling(2000).run(alone, seed=0).info
    assert info["acceptance_rate"][0] == pytest.approx(np.exp(Truth(alone).log_evidence[0]), abs=0.05)


def test_powers_and_products_of_different_alphas_keep_their_bounds() -> None:
    """The product's reward is its log-likelihood, and so is its upper bound; draws follow it all the same."""
    base = random_posterior(33, num_tokens=4)
    short = bk.TokenReward(lambda tokens, lengths: -lengths * 1.0, alpha=2.0, bounds=(-4, -1))
    zeros = bk.TokenReward(lambda tokens, lengths: tokens[:, 0] * 0.3, alpha=0.7, bounds=(0, 0.9))
    for likelihood, log_bound in ((short * zeros, -0.5 + 0.9 / 0.7), ((short * zeros) ** 0.5, (-0.5 + 0.9 / 0.7) / 2)):
        posterior = bk.Posterior(base.prior, likelihood, prompts=[[]], max_new_tokens=4)
        truth = Truth(posterior)
        draws = bk.RejectionSampling(3000).run(posterior, seed=0)
        assert chi_square_p(counts(truth, draws.tokens[0]), truth.p[0]) > 0.001
        expected = np.exp(truth.log_evidence[0] - log_bound)
        assert draws.info["acceptance_rate"][0] == pytest.approx(expected, rel=0.05)


def test_a_reward_without_an_upper_bound_is_refused_before_any_work() -> None:
    def untouched(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        raise AssertionError("The reward was called.")

    for bounds in (None, (0.0, np.inf)):
        likelihood = bk.TokenReward(untouched, alpha=1.0, bounds=bounds)
        posterior = bk.Posterior(random_posterior(1).prior, likelihood, prompts=[[]], max_new_tokens=3)
        with pytest.raises(bk.BayesKLRLError, match="unbounded above given to rejection sampling"):
            bk.RejectionSampling(5).run(posterior, seed=0)
    never = bk.Posterior(posterior.prior, likelihood * bk.Constraint(lambda completion_ids: []), max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match="unbounded above"):
        bk.RejectionSampling(5).run(never, seed=0)


def test_a_budget_that_ends_carries_what_was_drawn(backend: str) -> None:
    """The draws of an exhausted budget are the first ones of a sufficient one."""
    posterior = bounded(on(backend, random_posterior(31, num_tokens=4, prompts=((0,), (1, 2)), alpha=0.3)))
    with pytest.raises(bk.BudgetError, match="of num_draws = 200 draws of prompt") as caught:
        bk.RejectionSampling(200, max_proposals=300).run(posterior, seed=0)
    few = caught.value.draws
    assert few is not None
    assert 0 < few.shape[1] < 200
    enough = bk.RejectionSampling(200).run(posterior, seed=0)
    np.testing.assert_array_equal(few.tokens[0, :5], enough.tokens[0, :5])
    impossible = bk.Posterior(
        posterior.prior,
        bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), -np.inf), alpha=1.0, bounds=(0, 0)),
        prompts=[[0]],
        max_new_tokens=3,
    )
    with pytest.raises(bk.RewardError):  # -inf is outside the declared bounds
        bk.RejectionSampling(2, max_proposals=10).run(impossible, seed=0)
    nobody = bk.Posterior(
        posterior.prior,
        bk.Constraint(lambda completion_ids: [False] * len(completion_ids)),
        prompts=[[0]],
        max_new_tokens=3,
    )
    with pytest.raises(bk.BudgetError, match="0 of num_draws = 2 draws") as caught:
        bk.RejectionSampling(2, max_proposals=10).run(nobody, seed=0)
    assert caught.value.draws is None


# --- giving up under a power of the prior ----------------------------------------------------------------------


def uniform(vocab_size: int) -> bk.NgramLM:
    """A prior under which all completions are equally likely."""
    return bk.NgramLM(np.full(vocab_size, -np.log(vocab_size)), eos_token_id=None)


def num_proposals(error: bk.BudgetError) -> int:
    """The number of proposals that the message of an exhausted budget names."""
    return int(str(error).split("accepted in ")[1].split()[0])


def test_a_power_of_the_prior_that_accepts_nothing_is_given_up_early() -> None:
    """All completions have p0 = 8^-5, so that the acceptance rate is 8^-10 or 8^-15."""
    for likelihood in (bk.Power(4.0), bk.Power(3.0), bk.Power(2.0) * bk.Power(3.0, alpha=2.0)):
        posterior = bk.Posterior(uniform(8), likelihood, prompts=[[0], [1]], max_new_tokens=5)
        with pytest.raises(bk.BudgetError, match="0 of num_draws = 24") as caught:
            bk.RejectionSampling(24, max_proposals=20_000).run(posterior, seed=0)
        assert caught.value.draws is None
        assert num_proposals(caught.value) < 5_000


def test_other_rewards_have_their_whole_budget() -> None:
    """The first hundreds of proposals weigh e^-40 and say nothing about the completion that the bound is for."""
    rare = bk.TokenReward(lambda tokens, lengths: -40.0 * (tokens > 0).any(axis=1), alpha=1.0, bounds=(-40, 0))
    for likelihood in (rare, bk.Power(1.0) * rare):
        posterior = bk.Posterior(uniform(8), likelihood, max_new_tokens=4)
        draws = bk.RejectionSampling(1, max_proposals=60_000).run(posterior, seed=0)
        assert draws.info["num_proposals"][0] > 1_000
        assert not draws.tokens.any()


def test_where_one_acceptance_is_expected_nothing_is_given_up() -> None:
    """The posterior is on EOS at once, which one of 50 proposals is; the others weigh 50^-4 at most, too little to be seen."""
    prior = bk.NgramLM(np.full(50, -np.log(50)), eos_token_id=49)
    one = bk.Posterior(prior, bk.Power(2.0), prompts=[[0]], max_new_tokens=4)
    budget = 2450  # 1 / Z: the sum over t of 49^(t - 1) 50^(-2 t) is 1 / 2450
    with pytest.raises(bk.BudgetError, match=f"0 of num_draws = 1 draws .* accepted in {budget} proposals"):
        bk.RejectionSampling(1, max_proposals=budget).run(repeated(one, 60), seed=1)


def test_draws_are_exact_although_some_runs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is so high that about every other run is given up before it has a draw."""
    monkeypatch.setattr(accept_reject_module, "_HOPELESS", 10.0)
    monkeypatch.setattr(accept_reject_module, "_DOUBT", 0.5)
    posterior = bk.Posterior(random_posterior(1).prior, bk.Power(2.0), prompts=[[0]], max_new_tokens=3)
    truth, first, given_up = Truth(posterior), [], 0
    for seed in range(2500):
        try:
            draws: bk.Draws | None = bk.RejectionSampling(1, max_proposals=100).run(posterior, seed=seed)
        except bk.BudgetError as error:
            draws, given_up = error.draws, given_up + (num_proposals(error) < 100)
        if draws is not None:
            first.append(draws.tokens[0, 0])
    assert 500 < given_up < 2000
    assert chi_square_p(counts(truth, np.array(first)), truth.p[0]) > 0.001


def test_the_budget_is_kept_to_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reward(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        seen.append(len(tokens))
        return np.zeros(len(tokens))

    likelihood = bk.TokenReward(reward, alpha=1.0, bounds=(0, 20))
    posterior = bk.Posterior(random_posterior(1).prior, likelihood, prompts=[[]], max_new_tokens=3)
    with pytest.raises(bk.BudgetError, match="in 777 proposals"):
        bk.RejectionSampling(5, max_proposals=777).run(posterior, seed=0)
    assert sum(seen) == 777


# --- quasi-rejection -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gold() -> Truth:
    return Truth(problems.gold_posterior(alpha=0.25))


def quasi_law(truth: Truth, log_bound: float, log_q: np.ndarray) -> tuple[np.ndarray, float]:
    """p_B and log Z_B."""
    joint = truth.log_posterior[0] + truth.log_evidence[0]
    mass = np.minimum(np.exp(joint), np.exp(log_bound + log_q))
    return mass / mass.sum(), float(np.log(mass.sum()))


def other_proposal() -> bk.NgramLM:
    return full_table(bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3), 3, noise=0.4, seed=1)


@crossed(log_bound=[6.0, 3.0, 9.0], proposal=["prior", "other"])
def test_quasi_rejection_follows_its_own_law_and_knows_how_far_off_it_is(
    backend: str, log_bound: float, proposal: str, gold: Truth
) -> None:
    posterior = on(backend, problems.gold_posterior(alpha=0.25))
    lm = None if proposal == "prior" else other_proposal()
    q = bk.Posterior(lm or posterior.prior, posterior.likelihood, prompts="", max_new_tokens=6)
    law, log_kept = quasi_law(gold, log_bound, q.log_prior(gold.sequences)[0])
    draws = bk.QuasiRejection(4000, bound=log_bound, proposal=lm).run(posterior, seed=3)
    assert chi_square_p(counts(gold, draws.tokens[0]), law) > 0.001
    # the inequalities, by the exact law
    tvd = 0.5 * np.abs(law - gold.p[0]).sum()
    kl = float((law * (np.log(law) - gold.log_posterior[0])).sum())
    tvd_bound, kl_bound = 1 - np.exp(log_kept - gold.log_evidence[0]), gold.log_evidence[0] - log_kept
    assert -1e-12 <= tvd <= tvd_bound + 1e-12
    assert -1e-12 <= kl <= kl_bound + 1e-12
    # and what is reported about them
    info = {name: values[0] for name, values in draws.info.items()}
    assert info["tvd_bound"] == pytest.approx(tvd_bound, abs=0.02)
    assert info["kl_bound"] == pytest.approx(kl_bound, abs=0.04)
    kl_prior = float((law * (np.log(law) - gold.log_prior[0])).sum())
    assert info["kl_prior"] == pytest.approx(kl_prior, abs=0.05)
    assert info["log_evidence_estimate"] == pytest.approx(gold.log_evidence[0], abs=0.05)
    assert info["acceptance_rate"] == pytest.approx(np.exp(log_kept - log_bound), rel=0.1)
    assert info["num_proposals"] == pytest.approx(4000 / info["acceptance_rate"], rel=0.1)
    if log_bound == 3.0:
        assert chi_square_p(counts(gold, draws.tokens[0]), gold.p[0]) < 1e-10  # not the posterior, nor near it


def test_a_bound_that_holds_makes_it_rejection(backend: str) -> None:
    posterior = on(backend, problems.gold_posterior())
    log_bound = posterior.likelihood.bounds[1] / posterior.alpha  # type: ignore[index]
    exact = bk.RejectionSampling(50).run(posterior, seed=4)
    quasi = bk.QuasiRejection(50, bound=log_bound).run(posterior, seed=4)
    np.testing.assert_array_equal(exact.tokens, quasi.tokens)
    np.testing.assert_array_equal(exact.info["num_proposals"], quasi.info["num_proposals"])
    assert quasi.info["tvd_bound"] == pytest.approx([0.0], abs=1e-12)


def test_the_bounds_of_quasi_rejection_are_monotone(backend: str) -> None:
    posterior = on(backend, problems.gold_posterior(alpha=0.25))
    infos = [bk.QuasiRejection(400, bound=b).run(posterior, seed=5).info for b in (2.0, 4.0, 6.0, 8.0)]
    for name, sign in (("tvd_bound", -1), ("kl_bound", -1), ("acceptance_rate", -1), ("num_proposals", 1)):
        assert (sign * np.diff([info[name][0] for info in infos]) > 0).all()


# --- best of n, by order statistics ----------------------------------------------------------------------------


def binned_posterior() -> bk.Posterior:
    """Two prompts, and a reward of few levels."""
    binned = bk.TokenReward(lambda tokens, lengths: np.minimum(lengths, 3) + (tokens[:, 0] == 1) * 1.0, alpha=1.0)
    return bk.Posterior(random_posterior(40).prior, binned, prompts=[[0], [1]], max_new_tokens=4)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_law_of_best_of_n(n: int) -> None:
    """Against a simulation of n candidates a draw by the enumerated prior, ties to the first, in plain NumPy."""
    posterior = random_posterior(40, num_tokens=4, prompts=((0,), (1,)))
    binned = bk.TokenReward(lambda tokens, lengths: np.minimum(lengths, 3) + (tokens[:, 0] == 1) * 1.0, alpha=1.0)
    posterior = bk.Posterior(posterior.prior, binned, prompts=[[0], [1]], max_new_tokens=4)
    exact = bk.Exact().run(posterior, seed=0)
    law = np.exp(best_of_n_log_probs(exact, n))
    np.testing.assert_allclose(law.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    kl = best_of_n_kl(exact.reward, n, exact.log_prior)
    wins = best_of_n_win_rate(exact.reward, n, exact.log_prior)
    rng = np.random.default_rng(0)
    for p in range(2):
        p0 = np.exp(exact.log_prior[p])
        candidates = rng.choice(p0.size, size=(4000, n), p=p0 / p0.sum())
        best = candidates[np.arange(4000), exact.reward[p][candidates].argmax(axis=1)]
        assert chi_square_p(np.bincount(best, minlength=p0.size), law[p]) > 0.001
        some = law[p] > 0
        assert kl[p] == pytest.approx((law[p][some] * np.log(law[p][some] / p0[some])).sum(), abs=1e-12)
        assert kl[p] <= best_of_n_kl_bound(n) + 1e-12
        other = exact.reward[p][rng.choice(p0.size, size=4000, p=p0 / p0.sum())]
        won = (exact.reward[p][best] > other) + 0.5 * (exact.reward[p][best] == other)
        assert n == 1 or abs(z_score(won, wins[p])) < 3.5
    assert n > 1 or kl == pytest.approx([0, 0], abs=1e-12)
    assert (wins <= n / (n + 1) + 1e-12).all()


def test_without_ties_the_bound_is_exact() -> None:
    rewards = np.random.default_rng(0).standard_normal((3, 500))
    for n in (1, 2, 10, 300):
        np.testing.assert_allclose(best_of_n_kl(rewards, n), best_of_n_kl_bound(n), rtol=0, atol=1e-12)
        np.testing.assert_allclose(best_of_n_win_rate(rewards, n), n / (n + 1), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_estimates_from_candidates_reach_the_truth_and_never_exceed_the_bound() -> None:
    """The error of the estimate that a run reports falls with the number of draws, as 1 / sqrt(N)."""
    posterior = binned_posterior()
    exact = bk.Exact().run(posterior, seed=0)
    for n in (2, 16):
        (truth, _) = best_of_n_kl(exact.reward, n, exact.log_prior)
        assert truth < best_of_n_kl_bound(n) - 0.05
        errors = {}
        for num_draws in (40, 640):
            runs = [bk.BestOfN(n, num_draws).run(posterior, seed=seed).info["kl_prior"][0] for seed in range(20)]
            assert max(runs) <= best_of_n_kl_bound(n) + 1e-12
            errors[num_draws] = np.sqrt(np.mean(np.square(np.array(runs) - truth)))
        assert errors[640] < 0.02
        assert errors[640] < 0.5 * errors[40]


def test_binary_rewards_which_the_bound_is_useless_for() -> None:
    likelihood = bk.TokenReward(lambda tokens, lengths: (tokens[:, 0] == 0) * 1.0, alpha=1.0)
    posterior = bk.Posterior(bk.NgramLM(np.log(np.full((3, 3), 1 / 3)), eos_token_id=2), likelihood, max_new_tokens=3)
    draws = bk.BestOfN(64, 200).run(posterior, seed=0)
    assert draws.info["kl_prior"][0] == pytest.approx(np.log(3), abs=0.05)
    assert best_of_n_kl_bound(64) > 3
    assert draws.info["win_rate"][0] == pytest.approx(1 / 2 * 1 / 3 + 2 / 3, abs=0.02)


def test_the_exact_law_needs_an_enumeration() -> None:
    with pytest.raises(bk.BayesKLRLError, match="needs every completion once"):
        best_of_n_log_probs(bk.ImportanceSampling(50).run(problems.gold_posterior(), seed=0), 4)
