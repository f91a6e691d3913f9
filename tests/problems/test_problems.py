"""The problems P6, P8, P9, P11 and P13 against computations of their own, and the suite's truths against the gold numbers."""

import math

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.problems.preferences import bradley_terry, gold_reward
from tests.helpers.truth import Truth, completions, z_score

# theory.md 8: log Z, and KL(p* || p0) where it is printed
GOLD = {
    "P1": (1.65238447, 0.57797880),
    "P1-sharp": (5.87342935, 1.25254488),
    "P2": (1.60499324, 0.54773252),
    "P2-long": (1.60499264, 0.54773436),
    "P3": (6.412374, 8.819018),
    "P3-long": (24.208230, 35.770401),
    "P4": (-6.3014, 6.3014),
    "P4-long": (-24.4799, 24.4799),
    "P5": (6.324288, 1.664053),
    "P5-rare": (0.018909, 0.130990),
}


@pytest.mark.parametrize("name", GOLD)
def test_truths_are_the_gold_numbers(name: str) -> None:
    truth = problems.SUITE[name].truth
    digits = 5e-5 if name.startswith("P4") else 6e-7 if name[:2] in ("P3", "P5") else 6e-9
    assert truth.is_exact
    np.testing.assert_allclose((truth.log_evidence[0], truth.kl[0]), GOLD[name], rtol=0, atol=digits)


@pytest.mark.parametrize("name", ["P1", "P6", "P8", "P8-most", "P13"])
def test_truths_by_plain_enumeration(name: str) -> None:
    problem = problems.SUITE[name]
    plain, known = Truth(problem.posterior), problem.truth
    reward = (plain.p * plain.reward).sum(axis=1)
    kl = (plain.p * (plain.log_posterior - plain.log_prior)).sum(axis=1)
    np.testing.assert_allclose(known.log_evidence, plain.log_evidence, atol=1e-10)
    np.testing.assert_allclose(known.reward, reward, atol=1e-10)
    np.testing.assert_allclose(known.kl, kl, atol=1e-9)


def test_problems_are_made_once_and_only_when_asked_for() -> None:
    problem = problems.Problem("X", "a test", problems.gold_posterior, problems.by_enumeration)
    assert "posterior" not in vars(problem)
    assert problem.posterior is problem.posterior
    assert problem.truth is problem.truth


# P6


def product_kls(theta: np.ndarray, num_tokens: int, posterior: Truth) -> tuple[np.ndarray, np.ndarray]:
    """KL(q || p*) and KL(p* || q) of product guides with q(1) = theta."""
    ones = posterior.sequences.tokens[0].sum(axis=1)
    log_q = ones * np.log(theta)[:, None] + (num_tokens - ones) * np.log1p(-theta)[:, None]
    reverse = (np.exp(log_q) * (log_q - posterior.log_posterior[0])).sum(axis=1)
    forward = (posterior.p[0] * (posterior.log_posterior[0] - log_q)).sum(axis=1)
    return reverse, forward


def test_two_modes_and_product_guides_at_six_tokens() -> None:
    posterior = problems.two_modes()
    truth = Truth(posterior)
    theta = np.linspace(0.001, 0.9999, 20_000)
    reverse, forward = product_kls(theta, 6, truth)
    one_mode = -truth.log_posterior[0, truth.xs.index([1] * 6)]
    assert one_mode == pytest.approx(0.704, abs=6e-4)  # the number of theory.md 8.6 is that of the mode itself
    assert reverse.min() == pytest.approx(0.7015, abs=6e-5)  # a product does better by not being quite as sure
    assert abs(theta[reverse.argmin()] - 0.5) > 0.49  # one mode
    assert theta[forward.argmin()] == pytest.approx(0.5, abs=1e-4)
    assert forward.min() == pytest.approx(3.37, abs=5e-3)
    assert posterior.reward(truth.sequences)[0].mean() == pytest.approx(0.031, abs=5e-4)  # of the uniform guide


@pytest.mark.parametrize("order", [1, 4])
def test_two_modes_closed_form(order: int) -> None:
    options = {"second_mode_mass": 0.01, "alpha": 0.25}
    posterior = problems.two_modes(4, order=order, **options)
    plain, known = Truth(posterior), problems.two_modes_truth(4, **options)
    np.testing.assert_allclose(known.log_evidence, plain.log_evidence, atol=1e-12)
    np.testing.assert_allclose(known.reward, (plain.p * plain.reward).sum(axis=1), atol=1e-12)
    assert math.exp(posterior.log_prior([[1, 1, 1, 1]])[0, 0]) == pytest.approx(0.01, rel=1e-12)
    assert posterior.prior.log_probs.shape == (2,) * order


def test_two_modes_refuses_what_is_no_mass() -> None:
    with pytest.raises(bk.BayesKLRLError, match="below 1"):
        problems.two_modes(second_mode_mass=1.5)
    with pytest.raises(bk.BayesKLRLError, match="at most 20"):
        problems.two_modes(order=21)


# P8


def test_rare_feature_is_the_logit_difference() -> None:
    found = problems.rare_feature()
    logit = math.log(0.5 / 0.5) - math.log(0.07 / 0.93)
    assert found.prior_means[0] == pytest.approx(0.07, abs=1e-12)
    assert found.lambdas[0] == pytest.approx(logit, abs=1e-9)
    assert found.lambdas[0] == pytest.approx(2.587, abs=5e-4)
    assert found.alphas[0] == pytest.approx(1 / logit, abs=1e-9)
    assert Truth(found.posterior).p @ found.posterior.reward(Truth(found.posterior).sequences)[0] == pytest.approx(0.5)


def two_features() -> list[bk.TokenReward]:
    length = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, name="length")
    zeros = bk.TokenReward(
        lambda tokens, lengths: ((tokens == 0) & (np.arange(tokens.shape[1]) < lengths[:, None])).sum(axis=1), alpha=7.0
    )
    return [length, zeros]


def test_moment_constraints_of_two_features_and_two_prompts() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    found = bk.moment_constraint(prior, two_features(), [2.5, 1.6], prompts=[[0], [2]], max_new_tokens=4)
    plain = Truth(found.posterior)
    lengths = plain.sequences.lengths
    zeros = ((plain.sequences.tokens == 0) & (np.arange(4) < lengths[..., None])).sum(axis=2)
    assert found.is_exact
    assert (found.lambdas < 0).any()  # pushing a mean down is a negative alpha, which only the reward's sign can carry
    assert (plain.p * lengths).sum(axis=1).mean() == pytest.approx(2.5, abs=1e-8)
    assert (plain.p * zeros).sum(axis=1).mean() == pytest.approx(1.6, abs=1e-8)
    np.testing.assert_allclose(found.log_evidence, plain.log_evidence, atol=1e-10)


def test_a_bare_function_of_tokens_is_a_feature() -> None:
    prior = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
    bare = bk.moment_constraint(prior, lambda tokens, lengths: lengths, 2.5, max_new_tokens=4)
    wrapped = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    np.testing.assert_array_equal(bare.lambdas, bk.moment_constraint(prior, wrapped, 2.5, max_new_tokens=4).lambdas)


def test_moment_constraints_from_a_pool_agree_with_the_exact_ones() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    exact = bk.moment_constraint(prior, two_features()[1], 2.0, max_new_tokens=4)
    pools = [
        bk.moment_constraint(prior, two_features()[1], 2.0, max_new_tokens=4, num_draws=4000, seed=seed)
        for seed in range(20)
    ]
    assert all(pool.means[0] == pytest.approx(2.0, abs=1e-8) and pool.ess[0] > 100 for pool in pools)
    assert abs(z_score(np.array([pool.lambdas[0] for pool in pools]), exact.lambdas[0])) < 4


def test_means_that_cannot_be_had_are_refused() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    length, zeros = two_features()
    with pytest.raises(bk.BayesKLRLError, match=r"No distribution.*from 1 to 4"):
        bk.moment_constraint(prior, length, 4.5, max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match=r"infinite.*bk\.Constraint"):
        bk.moment_constraint(prior, length, 4.0, max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="outside the hull"):  # more zeros than tokens
        bk.moment_constraint(prior, [length, zeros], [1.5, 2.0], max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="on the boundary"):  # between "EOS" and "0 0 0 0"
        bk.moment_constraint(prior, [length, zeros], [2.5, 2.0], max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="hard constraint has no"):
        bk.moment_constraint(prior, bk.Constraint(lambda completions: [True]), 0.5, max_new_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="one finite number per feature, 1 in all"):
        bk.moment_constraint(prior, length, [1.0, 2.0], max_new_tokens=4)
    with pytest.raises(bk.BudgetError, match="Raise num_draws"):
        bk.moment_constraint(prior, zeros, 2.9, max_new_tokens=4, num_draws=100)


# P11


def small_text(max_new_tokens: int = 5) -> bk.Posterior:
    return problems.constraint_text(
        max_new_tokens, order=2, max_word_length=2, word="a", forbidden="c", texts=("ab a ba c", "a bc ab", "b a a bb")
    )


@pytest.mark.slow
def test_rules_by_brute_force() -> None:
    posterior = small_text(7)  # room for a word that is too long, and all that is asked for after it
    plain, messages = Truth(posterior), backward_messages(posterior)
    np.testing.assert_allclose(messages.log_evidence, plain.log_evidence, atol=1e-12)
    texts = posterior.prior.decode(plain.xs)
    for text, reward in zip(texts, plain.reward[0], strict=True):
        obeys = " a " in text and "c" not in text and max(map(len, text.split(" "))) <= 2
        assert (reward == 0) == obeys, text


def test_local_masking_obeys_the_rules_and_has_the_wrong_distribution() -> None:
    posterior = small_text()
    plain = Truth(posterior)
    masked = problems.masked_policy(posterior)
    log_q = masked.token_log_probs([[]], plain.sequences).sum(axis=2)
    possible = np.isfinite(plain.reward)
    q = np.where(possible, np.exp(log_q), 0.0)
    assert q.sum() == pytest.approx(1, abs=1e-12)
    assert (np.exp(log_q)[~possible] == 0).all()
    kl = (q[possible] * (log_q[possible] - plain.log_posterior[possible])).sum()
    assert kl > 0.05
    draws = bk.ImportanceSampling(2000, proposal=masked).run(posterior, seed=0)  # SMC and IS correct it
    assert abs(z_score(np.exp(draws.log_weights[0]), math.exp(plain.log_evidence[0]))) < 4
    assert abs(z_score(plain.log_evidence[0] - draws.log_weights[0], kl)) < 4  # E_q[log q - log p*] is the KL


def test_masking_by_hand() -> None:
    # "may a be followed by anything that fits": with two tokens left of "needs ' a '", only one way remains
    posterior = small_text(3)
    masked = problems.masked_policy(posterior)
    state = masked.prefill([[]])
    assert masked.decode([[int(masked.next_log_probs(state).argmax())]]) == [" "]
    assert masked.next_log_probs(state).max() == 0.0


def test_a_text_without_rules_is_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match="needs a rule"):
        problems.constraint_text(max_word_length=None, word=None, forbidden="")
    with pytest.raises(bk.BayesKLRLError, match="not in the vocabulary"):
        problems.constraint_text(forbidden="7")


# P13


def test_gold_peaks_where_its_covariance_with_the_proxy_crosses_zero() -> None:
    task = problems.overoptimisation()
    peak = task.peak()
    around = task.curve(np.array([0.98, 1.0, 1.02]) * peak)
    assert around.gold[1] > max(around.gold[0], around.gold[2])
    assert abs(around.covariance[1]) < 1e-9
    assert around.covariance[0] > 0 > around.covariance[2]
    at_alpha = task.curve(1 / task.posterior.alpha)
    assert at_alpha.gold[0] < around.gold[1]
    assert at_alpha.proxy[0] > around.proxy[1]  # more of the proxy, less of what it stands for


def test_the_curve_is_that_of_the_posteriors() -> None:
    task = problems.overoptimisation(50, max_new_tokens=4)
    plain = Truth(task.posterior)
    gold = gold_reward(plain.sequences.tokens[0], plain.sequences.lengths[0])
    b = 1 / task.posterior.alpha
    curve = task.curve([b, b + 1e-5])
    assert curve.gold[0] == pytest.approx(float(plain.p[0] @ gold), abs=1e-10)
    assert curve.proxy[0] == pytest.approx(float(plain.p[0] @ plain.reward[0]), abs=1e-10)
    assert np.diff(curve.gold)[0] / 1e-5 == pytest.approx(curve.covariance[0], abs=1e-4)


def test_gold_reward_in_words() -> None:
    for x in completions(4, [3], 4):
        twos = x.count(2)
        value = twos - 0.2 * twos**2 + ("01" in "".join(map(str, x)))
        padded = np.array([[*x, *[3] * (4 - len(x))]])
        assert gold_reward(padded, np.array([len(x)]))[0] == pytest.approx(value)


def test_bradley_terry_is_the_optimum_and_learns_the_weights() -> None:
    rng = np.random.default_rng(0)
    true = np.array([1.0, -0.5, 0.2])
    differences = rng.standard_normal((20_000, 3))
    wins = rng.random(20_000) < 1 / (1 + np.exp(-differences @ true))
    signed = np.where(wins[:, None], differences, -differences)
    fitted = bradley_terry(signed)
    gradient = signed.T @ (1 / (1 + np.exp(signed @ fitted))) - 0.1 * fitted
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    np.testing.assert_allclose(fitted, true, atol=0.08)  # four standard errors
    assert np.isfinite(bradley_terry(np.ones((5, 1)))).all()  # pairs that can be told apart


# P9


def tiny_gap() -> problems.Infilling:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    return problems.infilling(3, 2, num_suffixes=6, prompt=[0], prior=prior)


def test_infilling_by_enumeration() -> None:
    problem = tiny_gap()
    plain = Truth(problem.posterior)
    prior = problem.posterior.prior
    for p, suffix in enumerate(problem.suffixes.tolist()):  # log Z = log p0(suffix after three tokens)
        whole = [[*x, *suffix] for x in plain.xs if len(x) == 3 and x[-1] != 3]
        scored = bk.Posterior(prior, two_features()[0], prompts=[[0]], max_new_tokens=5).log_prior(whole)
        assert plain.log_evidence[p] == pytest.approx(float(np.log(np.exp(scored).sum())), abs=1e-12)
    known = problems.infilling_truth(problem, num_particles=64)
    assert (known.log_evidence_bounds[:, 0] <= plain.log_evidence).all()
    assert (known.log_evidence_bounds[:, 1] >= plain.log_evidence).all()
    assert known.mean_bounds[0] <= plain.log_evidence.mean() <= known.mean_bounds[1]
    assert not known.is_exact


def test_joint_draws_are_exact_posterior_draws() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    problem = problems.infilling(2, 1, num_suffixes=3000, prompt=[0], prior=prior, seed=5)
    posterior = problem.posterior
    log_phi = posterior.log_likelihood(problem.exact).ravel()
    expected = {}
    for y in np.unique(problem.suffixes).tolist():  # E[log phi] under the posterior of each suffix
        row = np.flatnonzero(problem.suffixes[:, 0] == y)[:1]
        xs = [x for x in completions(4, [3], 2) if len(x) == 2 and x[-1] != 3]
        tokens, lengths = np.array(xs), np.full(len(xs), 2)
        reward = posterior.reward_of_rows(tokens, lengths, np.repeat(row, len(xs)))
        log_prior = bk.Posterior(prior, two_features()[0], prompts=[[0]], max_new_tokens=2).log_prior(xs)[0]
        weights = np.exp(log_prior + reward)
        expected[y] = float(weights @ reward / weights.sum())
    means = np.array([expected[int(s[0])] for s in problem.suffixes])
    assert abs(z_score(log_phi - means, 0.0)) < 4


def test_infilling_gives_certificates_of_grade_a() -> None:
    problem = tiny_gap()
    posterior = problem.posterior
    certificate = bk.certify(
        posterior, posterior.prior, exact=problem.exact, seed=0, num_draws=64, num_particles=16, sampling_only=True
    )
    plain = Truth(posterior)
    assert certificate.grade == "A"
    low, high = certificate.pooled.log_evidence_bounds
    assert low <= plain.log_evidence.mean() <= high < np.inf


def test_infilling_that_never_comes_is_refused() -> None:
    short = bk.NgramLM(np.log([[1e-9, 1 - 1e-9]] * 2), eos_token_id=1)
    with pytest.raises(bk.BudgetError, match="shorter gap"):
        problems.infilling(5, 2, num_suffixes=500, prompt=[0], prior=short)


@pytest.mark.slow
def test_infilling_on_the_shipped_model() -> None:
    problem = problems.SUITE["P9"]
    truth = problem.truth
    assert (truth.log_evidence_bounds[:, 0] < truth.log_evidence_bounds[:, 1]).all()
    # E over joint draws of log p0(y): its mean lies between, being the mean of log Z
    draws = bk.ImportanceSampling(4096).run(problem.posterior, seed=3)
    assert truth.mean_bounds[0] <= draws.log_evidence.mean() + 0.5
    assert draws.log_evidence.mean() <= truth.mean_bounds[1]
    assert truth.mean_bounds[1] - truth.mean_bounds[0] < 3


def test_names_of_problems() -> None:
    assert problems.problem_names("p9-LONG", ()) == ("P9-long",)
    with pytest.raises(bk.BayesKLRLError, match=r"no problem 'P10'.*P1, P1-sharp.*P13"):
        problems.problem_names(["P10"], ())
    with pytest.raises(bk.BayesKLRLError, match="once"):
        problems.problem_names(["P1", "p1"], ())


def test_a_feature_may_be_a_plain_function_and_must_be_something() -> None:
    letters = bk.NgramLM.fit(["ab", "ba", "aab"], order=2)
    as_function = bk.moment_constraint(letters, lambda texts: [t.count("a") for t in texts], 1.5, max_new_tokens=3)
    as_reward = bk.moment_constraint(
        letters, bk.Reward(lambda texts: [t.count("a") for t in texts], alpha=9.0), 1.5, max_new_tokens=3
    )
    assert np.allclose(as_function.lambdas, as_reward.lambdas)
    assert np.allclose(as_function.means, 1.5)
    with pytest.raises(bk.BayesKLRLError, match="A feature is a function of completions"):
        bk.moment_constraint(letters, 3, 1.5, max_new_tokens=3)  # type: ignore[arg-type]
