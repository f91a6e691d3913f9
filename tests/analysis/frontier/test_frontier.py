"""`bk.frontier`: the curve against enumerated truth, its inverse, constraints, extension, refusals, table and picture."""

import functools
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.frontier.implied_alpha import monotone_root
from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.analysis.frontier.picture import policy_point
from bayes_klrl.problems import gold_posterior
from tests.helpers.backends import on
from tests.helpers.truth import Truth, full_table, random_posterior

GOLD = gold_posterior()
TWO = random_posterior(1, prompts=((0,), (2,)), prompt_shift=0.4)
CURVE = bk.frontier(GOLD, num_draws=4000, seed=0)

truth_of = functools.cache(Truth)


def exact(posterior: bk.Posterior, alpha: float) -> dict[str, float]:
    """The truth at an alpha, by enumeration, means over prompts; impossible completions have no weight."""
    truth = truth_of(posterior)
    possible = np.isfinite(truth.reward)
    joint = truth.log_prior + np.where(possible, truth.reward, -np.inf) / alpha
    log_z = np.log(np.exp(joint).sum(axis=1))
    p = np.exp(joint - log_z[:, None])
    reward = (p * np.where(possible, truth.reward, 0.0)).sum(axis=1)
    log_ratio = np.where(possible, truth.reward, 0.0) / alpha - log_z[:, None]
    kl = (p * log_ratio).sum(axis=1)
    square = (p * np.exp(log_ratio)).sum(axis=1)
    means = {"log_evidence": log_z, "reward": reward, "kl": kl, "ess": 1 / square}
    return {name: float(value.mean()) for name, value in means.items()}


def exact_points(posterior: bk.Posterior, inverse_alphas: np.ndarray) -> PathPoints:
    """What annealing would give without error: the enumerated truth of each prompt."""
    truth = truth_of(posterior)
    joint = truth.log_prior[:, None] + inverse_alphas[:, None] * truth.reward[:, None]  # (P, M, X)
    log_z = np.log(np.exp(joint).sum(axis=2))
    reward = (np.exp(joint - log_z[..., None]) * truth.reward[:, None]).sum(axis=2)
    zero = np.zeros_like(reward)
    return PathPoints(inverse_alphas, log_z, reward, log_evidence_se=zero + 0.01, reward_se=zero + 0.02, kl_se=zero)


@pytest.mark.parametrize("posterior", [GOLD, TWO], ids=["gold", "two prompts"])
def test_the_curve_is_the_enumerated_one(backend: str, posterior: bk.Posterior) -> None:
    alphas = np.array([4.0, 1.0, 0.5])
    curve = bk.frontier(on(backend, posterior), num_draws=6000, seed=2, alphas=alphas)
    for a, alpha in enumerate(alphas):
        truth = exact(posterior, alpha)
        assert curve.ess[a] == pytest.approx(6000 * truth["ess"], rel=0.1)
        for name in ("log_evidence", "reward", "kl"):
            assert curve.valid[name][a]
            assert abs(getattr(curve, name)[a] - truth[name]) < 4 * curve.mean.se[name][a]
            assert curve.lower[name][a] < getattr(curve, name)[a] < curve.upper[name][a]


def test_the_default_grid_shows_both_ends_and_the_posteriors_own_alpha() -> None:
    assert (np.diff(CURVE.alphas) < 0).all()
    assert np.isclose(CURVE.alphas, GOLD.alpha, rtol=1e-12).sum() == 1
    assert CURVE.kl[0] < 0.02
    assert CURVE.alphas[-1] < CURVE.cut < CURVE.alphas[0]
    np.testing.assert_array_equal(CURVE.within, CURVE.alphas >= CURVE.cut)
    assert CURVE.at(CURVE.cut).ess[0] == pytest.approx(100, rel=1e-6)
    assert (np.diff(CURVE.kl) > 0).all()
    assert (np.diff(CURVE.reward) > 0).all()
    assert (np.diff(CURVE.ess) < 0).all()
    assert CURVE.cost.model_tokens > 0


def test_the_same_seed_gives_the_numbers_of_importance_sampling() -> None:
    draws = bk.ImportanceSampling(4000).run(GOLD, seed=0)
    at = CURVE.at(GOLD.alpha)
    assert at.log_evidence[0] == pytest.approx(draws.log_evidence[0], abs=1e-12)
    assert at.se["log_evidence"][0] == pytest.approx(draws.log_evidence_se[0], rel=1e-9)
    assert at.ess[0] == pytest.approx(draws.ess[0])
    assert at.reward[0] == pytest.approx(draws.mean(draws.reward)[0])


@pytest.mark.parametrize(
    "asked", [{"kl": 0.3}, {"kl": 2.0}, {"kl": 1e-4}, {"reward": 1.7}, {"ess": 200}, {"ess": 3900}]
)
def test_alpha_for_inverts(asked: dict[str, float]) -> None:
    ((name, target),) = asked.items()
    alpha = CURVE.alpha_for(**asked)
    assert float(getattr(CURVE.at(alpha), name)[0]) == pytest.approx(target, rel=1e-8)


@functools.cache
def one_of_many(seed: int) -> bk.Frontier:
    return bk.frontier(GOLD, num_draws=1000, seed=seed, alphas=[1.0])


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"kl": 0.5}, {"reward": 1.5}, {"ess": 0.5}])
def test_the_interval_of_alpha_for_is_its_spread(asked: dict[str, float]) -> None:
    """Over 80 pools log alpha, less the enumerated one, is standard normal in units of its error."""
    ((name, target),) = asked.items()
    sign, scale = (-1, 1000) if name == "ess" else (1, 1)
    b = monotone_root(lambda x: sign * (exact(GOLD, 1 / x)[name] - target), start=1.0, low=1e-6)
    assert b is not None
    z = []
    for seed in range(80):
        low, high = one_of_many(seed).alpha_interval(**{name: scale * target})
        z.append(np.log(b * np.sqrt(low * high)) / (np.log(high / low) / (2 * 1.96)))
    assert abs(np.mean(z)) < 4 / np.sqrt(80)
    assert 0.75 < np.std(z) < 1.3  # sd of a sd of 80: 0.08


def test_the_curves_at_some_alphas_print_as_a_table() -> None:
    at = CURVE.at([1.0, CURVE.cut / 10])
    first, *lines = str(at).splitlines()
    assert repr(at) == str(at)
    assert first.split() == ["alpha", "log", "evidence", "reward", "KL", "to", "prior", "ESS"]
    half = 1.96 * at.se["log_evidence"][0]
    assert f"{at.log_evidence[0]:.3f} ± {half:.3f}" in lines[0]
    assert lines[1].startswith(" ~")
    assert "±" not in lines[1]
    assert "95% interval" in lines[-1]
    two = bk.frontier(TWO, num_draws=400, seed=0, alphas=[2.0, 1.0]).per_prompt
    assert repr(two) == str(two) == "Curves(2 prompts x 2 alphas)"


def test_of_several_prompts_the_error_says_that_the_cut_is_the_worst_ones() -> None:
    curve = bk.frontier(TWO, num_draws=600, seed=0)
    least = float(curve.at(curve.cut).ess[0])
    assert least > 100
    with pytest.raises(
        bk.BayesKLRLError, match=r"ESS below 100 for some prompt.*from \d+\.?\d* to 600 \(means over prompts\)"
    ):
        curve.alpha_for(ess=(100 + least) / 2)
    assert "(ESS of at least 100 for every prompt)" in str(curve)


def test_alpha_for_is_near_the_truth() -> None:
    alpha = CURVE.alpha_for(kl=0.5779788)  # theory.md 8.2: the KL at alpha = 1 / 1.5
    se = CURVE.at(GOLD.alpha).se["kl"][0]
    near = [exact(GOLD, GOLD.alpha * (1 + h))["kl"] for h in (-1e-3, 1e-3)]
    slope = (near[1] - near[0]) / (2e-3 * GOLD.alpha)
    assert abs(alpha - GOLD.alpha) < 4 * se / abs(slope)


@pytest.mark.parametrize(
    "asked, match",
    [
        ({"kl": 4.0}, r"ESS below 100.*from 0 to 2\.\d+; 0 itself.*Draw more|draw more"),
        ({"kl": 40.0}, "no positive alpha"),
        ({"kl": 0.0}, "no positive alpha"),
        ({"reward": -1.0}, "no positive alpha"),
        ({"reward": 9.0}, "no positive alpha"),
        ({"ess": 99.0}, "from 100 to 4000"),
        ({"ess": 4001}, "from 100 to 4000"),
        ({}, "exactly one"),
        ({"kl": 0.1, "ess": 200}, "exactly one"),
        ({"kl": np.nan}, "kl must be a finite number"),
        ({"kl": "1"}, "kl must be a finite number"),
    ],
)
def test_alpha_for_says_what_can_be_had(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=match):
        CURVE.alpha_for(**asked)


def test_a_constraint_is_untouched_by_alpha() -> None:
    """The curve starts at the constrained prior: log Z = log p0(A), KL = -log p0(A)."""
    base = random_posterior(2)
    even = bk.Constraint(lambda completion_ids: [len(ids) % 2 == 0 for ids in completion_ids])
    posterior = bk.Posterior(base.prior, base.likelihood * even, prompts=[[]], max_new_tokens=5)
    alphas = [1e6, 1.0, 0.5]
    curve = bk.frontier(posterior, num_draws=6000, seed=0, alphas=alphas)
    log_mass = exact(posterior, 1e12)["log_evidence"]
    assert log_mass < -0.3
    assert curve.log_evidence[0] == pytest.approx(log_mass, abs=4 * curve.mean.se["log_evidence"][0])
    assert curve.kl[0] == pytest.approx(-curve.log_evidence[0], abs=1e-4)
    for a, alpha in enumerate(alphas):
        truth = exact(posterior, alpha)
        for name in ("log_evidence", "reward", "kl"):
            assert abs(getattr(curve, name)[a] - truth[name]) < 4 * curve.mean.se[name][a]
    with pytest.raises(bk.BayesKLRLError, match="no positive alpha"):
        curve.alpha_for(kl=-0.5 * log_mass)
    assert curve.alpha_for(kl=-log_mass + 0.3) == pytest.approx(curve.alpha_for(kl=-log_mass + 0.3))
    alone = bk.Posterior(base.prior, even, prompts=[[]], max_new_tokens=5)
    with pytest.raises(bk.BayesKLRLError, match="constraints alone has no alpha"):
        bk.frontier(alone, num_draws=100, seed=0)


def test_rewards_of_different_alphas_share_one_path() -> None:
    """Such a product has alpha = 1 and the log-likelihood as its reward."""
    a = bk.TokenReward(lambda tokens, lengths: lengths, alpha=2.0)
    b = bk.TokenReward(lambda tokens, lengths: tokens[:, 0] == 1, alpha=0.5)
    posterior = bk.Posterior(GOLD.prior, a * b, max_new_tokens=5)
    curve = bk.frontier(posterior, num_draws=4000, seed=1)
    truth = exact(posterior, 1.0)
    at = curve.at(1.0)
    assert abs(at.kl[0] - truth["kl"]) < 4 * at.se["kl"][0]


def test_prompts_are_averaged() -> None:
    curve = bk.frontier(TWO, num_draws=2000, seed=0)
    assert curve.per_prompt.kl.shape == (2, curve.alphas.size)
    for name in ("log_evidence", "reward", "kl", "ess"):
        np.testing.assert_allclose(getattr(curve.per_prompt, name).mean(axis=0), getattr(curve, name))
        expected = np.sqrt(np.square(curve.per_prompt.se[name]).sum(axis=0)) / 2
        np.testing.assert_allclose(curve.mean.se[name], expected)
    np.testing.assert_array_equal(curve.within, curve.per_prompt.ess.min(axis=0) >= 100)
    alpha = curve.alpha_for(kl=0.5)
    assert curve.at(alpha).kl[0] == pytest.approx(0.5)


def test_a_constant_reward_has_no_slope() -> None:
    constant = bk.TokenReward(lambda tokens, lengths: np.ones(len(tokens)), alpha=0.5)
    curve = bk.frontier(bk.Posterior(GOLD.prior, constant, max_new_tokens=4), num_draws=200, seed=0)
    np.testing.assert_allclose(curve.log_evidence, 1 / curve.alphas)
    np.testing.assert_allclose(curve.kl, 0.0, atol=1e-12)
    assert curve.cut == 0
    assert not curve.valid["kl"].any()
    for asked in ({"kl": 0.1}, {"reward": 1.5}, {"reward": 1.0}, {"ess": 100}):
        with pytest.raises(bk.BayesKLRLError, match="no positive alpha"):
            curve.alpha_for(**asked)
    with pytest.raises(bk.BayesKLRLError, match="reach from 1 to 1"):
        curve.implied_alpha(1.0)


def test_a_binary_reward_is_reached_everywhere() -> None:
    """b = logit of the posterior's success less that of the prior's (theory.md 1.6)."""
    binary = bk.TokenReward(lambda tokens, lengths: tokens[:, 0] == 0, alpha=1.0, bounds=(0, 1))
    posterior = bk.Posterior(GOLD.prior, binary, max_new_tokens=3)
    curve = bk.frontier(posterior, num_draws=2000, seed=0)
    assert curve.cut == 0
    p = float((curve.pool.reward == 1).mean())
    alpha = curve.alpha_for(reward=0.9)
    assert 1 / alpha == pytest.approx(np.log(0.9 / 0.1) - np.log(p / (1 - p)))
    assert curve.implied_alpha(0.9).alpha == pytest.approx(alpha)
    assert curve.unseen_cut == 0
    assert "The draws reach every alpha." in str(curve)
    assert not any(exposed.any() for exposed in curve.mean.exposed.values())


@pytest.mark.parametrize("bounds", [None, (-np.inf, np.inf)])
def test_without_bounds_nothing_is_said_to_be_excluded(bounds: tuple[float, float] | None) -> None:
    binary = bk.TokenReward(lambda tokens, lengths: tokens[:, 0] == 0, alpha=1.0, bounds=bounds)
    curve = bk.frontier(bk.Posterior(GOLD.prior, binary, max_new_tokens=3), num_draws=500, seed=0)
    assert np.isnan(curve.unseen_cut)
    assert "The draws reach every alpha" not in str(curve)
    assert str(curve).count("cannot be excluded without declared bounds") == 1


def three_levels(bounds: tuple[float, float] | None) -> bk.Posterior:
    """Rewards 0, 1 and 3, the last of probability 1 / 10,000."""
    rare = bk.NgramLM(np.log([0.5, 0.4999, 0.0001]), eos_token_id=None)
    levels = bk.TokenReward(lambda tokens, lengths: np.array([0, 1, 3])[tokens[:, 0]], alpha=0.2, bounds=bounds)
    return bk.Posterior(rare, levels, max_new_tokens=1)


def test_a_level_that_the_bounds_allow_and_no_draw_has_shown_is_said() -> None:
    """log Z is 6.0 there, and the draws without the highest level say 4.3 +- 0.06 at an ESS of 500."""
    posterior = three_levels((0, 3))
    truth = exact(posterior, 0.2)["log_evidence"]
    curve = bk.frontier(posterior, num_draws=1000, seed=0)
    at = curve.at([0.2, 3.0])
    assert at.upper["log_evidence"][0] < truth - 1
    assert at.within.all()
    assert at.valid["log_evidence"].tolist() == [False, True]
    assert at.exposed["log_evidence"].tolist() == [True, False]
    assert 0.2 < curve.unseen_cut < 3
    edge = curve.at(curve.unseen_cut * np.array([1.001, 0.999])).exposed["log_evidence"]
    assert edge.tolist() == [False, True]
    assert "a reward up to 3, which the declared bounds allow and no draw has shown, could move" in str(curve)
    assert f"below alpha = {curve.unseen_cut:.4g}; probabilities below 0.003" in str(curve)
    assert "reach every alpha" not in str(curve)
    assert "no draw has shown" in curve._repr_html_()
    assert curve.at(curve.alpha_for(reward=0.99)).reward[0] == pytest.approx(0.99)  # by what was drawn, as before
    assert not curve.implied_alpha(0.99).valid


def test_bounds_that_were_reached_change_nothing() -> None:
    """The declared maximum was drawn: intervals are those without bounds."""
    posterior = {bounds: bk.Posterior(GOLD.prior, counts(bounds), max_new_tokens=3) for bounds in (None, (0, 3))}
    plain, bounded = (bk.frontier(each, num_draws=2000, seed=0) for each in posterior.values())
    assert bounded.pool.reward.max() == 3
    assert bounded.unseen_cut == 0
    for name in ("log_evidence", "reward", "kl", "ess"):
        np.testing.assert_array_equal(plain.valid[name], bounded.valid[name])
    assert bounded.valid["log_evidence"].any()


def counts(bounds: tuple[float, float] | None) -> bk.TokenReward:
    return bk.TokenReward(lambda tokens, lengths: (tokens != 3).sum(axis=1), alpha=1.0, bounds=bounds)


@pytest.mark.parametrize(
    "bounds, said",
    [
        (None, "cannot be excluded without declared bounds"),
        ((0.0, 1.1), "could move log Z out of its interval at every alpha"),
        ((0.0, 0.5), "they show no curve.\n"),
    ],
)
def test_draws_of_one_reward_say_so(bounds: tuple[float, float] | None, said: str) -> None:
    constant = bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), 0.5), alpha=0.05, bounds=bounds)
    curve = bk.frontier(bk.Posterior(GOLD.prior, constant, max_new_tokens=2), num_draws=200, seed=0)
    assert "All draws have the reward 0.5: they show no curve." in str(curve)
    assert said in str(curve)
    assert "reach every alpha" not in str(curve)


def test_where_it_is_extrapolation_anyhow_bounds_are_not_spoken_of() -> None:
    base = random_posterior(1)
    reward: Any = base.likelihood
    high = float(truth_of(base).reward.max()) + 0.01
    bounded = bk.Posterior(
        base.prior,
        bk.TokenReward(reward.fn, alpha=reward.alpha, bounds=(-99.0, high)),
        prompts=base.prompts,
        max_new_tokens=base.max_new_tokens,
    )
    curve = bk.frontier(bounded, num_draws=4000, seed=0)
    assert 0 <= curve.unseen_cut < curve.cut
    assert "no draw has shown" not in str(curve)


def test_few_draws_reach_nothing_and_say_so() -> None:
    curve = bk.frontier(GOLD, num_draws=2, seed=0)
    assert np.isinf(curve.cut)
    assert not curve.within.any()
    assert "reach no alpha" in str(curve)
    with pytest.raises(bk.BayesKLRLError, match="at every alpha"):
        curve.alpha_for(kl=0.1)


def test_draws_from_a_proposal_serve_as_a_pool(backend: str) -> None:
    """Here a policy near the posterior, whose draws reach colder than the prior's."""
    posterior = on(backend, random_posterior(1, alpha=0.4))
    truth = Truth(posterior)
    draws = bk.ImportanceSampling(4000, proposal=full_table(truth.policy(), noise=0.1)).run(posterior, seed=3)
    curve = bk.frontier(posterior, draws=draws)
    assert curve.cut < bk.frontier(posterior, num_draws=4000, seed=0).cut
    for alpha in (0.4, 0.3):
        at, expected = curve.at(alpha), exact(posterior, alpha)
        for name in ("log_evidence", "reward", "kl"):
            assert at.valid[name][0]
            assert abs(float(getattr(at, name)[0]) - expected[name]) < 4 * at.se[name][0]


def test_the_gap_of_a_policy_is_its_kl_to_the_posterior_of_its_own_reward(backend: str) -> None:
    posterior = on(backend, random_posterior(3, alpha=1.0))
    truth = Truth(posterior)
    policy = full_table(truth.policy(), noise=0.6, seed=1)
    log_q = bk.Posterior(policy, posterior.likelihood, prompts=[[]], max_new_tokens=5).log_prior(truth.sequences)[0]
    q = np.exp(log_q)
    reward, kl = float(q @ truth.reward[0]), float(q @ (log_q - truth.log_prior[0]))
    curve = bk.frontier(posterior, num_draws=20_000, seed=0)
    found = curve.gap(reward, kl)
    b = found.implied.inverse_alpha
    nearest = truth.log_prior[0] + b * truth.reward[0]
    nearest -= np.log(np.exp(nearest).sum())
    assert found.implied.valid
    assert abs(found.value - float(q @ (log_q - nearest))) < 4 * found.se
    assert found.value > 4 * found.se
    below = curve.implied_alpha(float(np.exp(truth.log_prior[0]) @ truth.reward[0]) - 0.3)
    assert below.alpha < 0


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"num_draws": 1, "seed": 0}, "num_draws must be an integer of at least 2; got 1"),
        ({"num_draws": 2.5, "seed": 0}, "num_draws must be an integer"),
        ({"num_draws": 10}, "needs num_draws= and seed="),
        ({"seed": 0}, "needs num_draws= and seed="),
        ({"num_draws": 10, "seed": -1}, "seed must be"),
        ({"num_draws": 10, "seed": 0, "alphas": [1.0, 0.0]}, "alphas must be positive"),
        ({"num_draws": 10, "seed": 0, "alphas": [-1.0]}, "alphas must be positive"),
        ({"num_draws": 10, "seed": 0, "alphas": []}, "alphas must be positive"),
        ({"num_draws": 10, "seed": 0, "alphas": [[1.0]]}, "alphas must be positive"),
        ({"num_draws": 10, "seed": 0, "alphas": "warm"}, "alphas must be positive"),
        ({"num_draws": 10, "seed": 0, "alphas": [np.inf]}, "alphas must be positive"),
        ({"draws": bk.ImportanceSampling(20).run(GOLD, seed=0), "seed": 0}, "not both"),
        ({"draws": bk.ImportanceSampling(20).run(gold_posterior(0.5), seed=0)}, "another posterior"),
        ({"draws": bk.ImportanceSampling(20).run(TWO, seed=0)}, "another posterior"),
        (
            {"draws": bk.ImportanceSampling(20).run(GOLD, seed=0).resample(20, seed=0)},
            "resampled or weighted otherwise",
        ),
        ({"draws": bk.SMC(200, ess_threshold=1.0).run(GOLD, seed=0)}, "'SMC', resampled"),
        ({"draws": bk.BestOfN(2, 20).run(GOLD, seed=0)}, "'BestOfN'"),
        ({"draws": bk.Exact().run(GOLD, seed=0)}, "'Exact'"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=match):
        bk.frontier(GOLD, **arguments)


def test_a_posterior_is_needed_and_a_possible_draw() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"posterior must be a bk\.Posterior"):
        bk.frontier(GOLD.prior, num_draws=10, seed=0)  # type: ignore[arg-type]
    never = bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), -np.inf), alpha=1.0)
    with pytest.raises(bk.BudgetError, match="None of the 10 draws"):
        bk.frontier(bk.Posterior(GOLD.prior, never, max_new_tokens=3), num_draws=10, seed=0)


def test_the_table_and_the_print() -> None:
    table = CURVE.table()
    assert table.index.name == "alpha"
    assert list(table["kl"]) == list(CURVE.kl)
    known = table[table["within"]]
    assert (known["kl_lower"] <= known["kl"]).all()
    assert table.loc[~table["within"], ["kl_lower", "log_evidence_upper"]].isna().all(axis=None)
    assert list(table["within"]) == list(CURVE.within)
    assert repr(CURVE).startswith(f"Frontier({CURVE.alphas.size} alphas from ")
    printed = str(CURVE)
    assert max(map(len, printed.splitlines())) < 140
    assert f"down to alpha = {CURVE.cut:.4g}" in printed
    (own,) = [line for line in printed.splitlines() if line.startswith("* ") and "posterior's" not in line]
    assert f"{CURVE.at(GOLD.alpha).kl[0]:.3f}" in own
    extrapolated = [line for line in printed.splitlines() if line[1:2] == "~"]
    assert extrapolated
    assert not any("±" in line for line in extrapolated)
    assert "± is a 95% interval" in printed
    assert "~: extrapolation, log Z and reward too low as a rule" in printed


def png_size(file: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


@pytest.mark.slow
def test_the_picture(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(200).run(GOLD, seed=0)
    guide = replace(
        draws, log_weights=np.zeros(draws.shape), log_evidence=np.full(1, np.nan), log_proposal=draws.log_prior + 0.1
    )
    policies = {"a $pair$": (1.0, 1.5), "the posterior": draws, "a guide": guide, "worse than the prior": (0.5, -0.2)}
    file = CURVE.plot(tmp_path / "frontier.png", policies=policies)
    assert png_size(file)[0] >= 1600
    constant = bk.TokenReward(lambda tokens, lengths: np.ones(len(tokens)), alpha=0.5)
    hard = bk.Constraint(lambda completion_ids: [len(ids) > 1 for ids in completion_ids])
    odd = [
        bk.frontier(bk.Posterior(GOLD.prior, constant, max_new_tokens=4), num_draws=200, seed=0),
        bk.frontier(bk.Posterior(GOLD.prior, GOLD.likelihood * hard, max_new_tokens=6), num_draws=400, seed=0),
        bk.frontier(GOLD, num_draws=2, seed=0),
        bk.frontier(GOLD, num_draws=600, seed=0, extend=exact_points(GOLD, np.linspace(0, 30, 90))),
        bk.frontier(
            GOLD, num_draws=600, seed=0, extend=replace(exact_points(GOLD, np.linspace(0, 30, 90)), num_particles=9)
        ),
        bk.frontier(TWO, num_draws=400, seed=0, alphas=[1.0]),
    ]
    for number, curve in enumerate(odd):
        assert png_size(curve.plot(tmp_path / f"{number}.png"))[0] >= 1600


def test_a_policy_is_a_point() -> None:
    draws = bk.ImportanceSampling(500).run(GOLD, seed=0)
    kl, reward = policy_point("posterior", draws)
    assert reward == pytest.approx(float(draws.mean(draws.reward)[0]))
    assert kl == pytest.approx(reward / GOLD.alpha - float(draws.log_evidence[0]))
    for wrong, match in (
        (3.0, "pair"),
        ((1.0, 2.0, 3.0), "pair"),
        ((np.nan, 1.0), "no plot can show"),
        (bk.BestOfN(2, 20).run(GOLD, seed=0), "no density"),
        (bk.Fit(GOLD.prior, {}, GOLD, None), r"fit\.run"),  # type: ignore[arg-type]
    ):
        with pytest.raises(bk.BayesKLRLError, match=match):
            policy_point("mine", wrong)


def test_draws_of_another_reward_or_prior_are_refused() -> None:
    """Same prompts and alpha, so nothing but the rewards themselves can tell."""
    ours = random_posterior(0, num_tokens=3)
    lengths = bk.TokenReward(lambda tokens, lengths: 5.0 * lengths, alpha=ours.alpha)
    for other, what in (
        (bk.Posterior(ours.prior, lengths, prompts=ours.prompts, max_new_tokens=3), "the reward"),
        (
            bk.Posterior(random_posterior(1).prior, ours.likelihood, prompts=ours.prompts, max_new_tokens=3),
            "the prior log-prob",
        ),
    ):
        draws = bk.ImportanceSampling(200).run(other, seed=0)
        with pytest.raises(bk.BayesKLRLError, match=what):
            bk.frontier(ours, draws=draws)
    with pytest.raises(bk.BayesKLRLError, match="ImportanceSampling"):
        bk.frontier(ours, draws=3)  # type: ignore[arg-type]


def test_a_step_too_large_to_interpolate_shows_in_the_intervals() -> None:
    """The pilot's last step goes from alpha = 0.1 to 0.003, where KL came out as 2.4 +- 1.4 instead of 4.9."""
    posterior = random_posterior(4, vocab_size=3, eos=(2,), num_tokens=3, alpha=0.01)
    alphas = np.geomspace(0.02, 0.01 / 3, 5)
    curve = bk.frontier(posterior, num_draws=400, seed=0, alphas=alphas, extend=bk.AnnealedSMC(64))
    for a, alpha in enumerate(curve.alphas):
        colder = bk.Posterior(posterior.prior, posterior.likelihood ** (0.01 / alpha), max_new_tokens=3)
        truth = bk.Exact().run(colder, seed=0)
        mass = np.exp(truth.log_prior + truth.log_likelihood - truth.log_evidence[:, None])
        reward = float((mass * truth.reward).sum())
        kl = reward / alpha - float(truth.log_evidence[0])
        assert curve.lower["kl"][a] <= kl <= curve.upper["kl"][a]


@pytest.mark.slow
def test_one_alpha_for_the_mean_kl_of_32_prompts() -> None:
    """The exact mean KL at the alpha that draws give, over eight sets of draws."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 3, 3).tolist() for _ in range(32)]
    many = random_posterior(7, vocab_size=4, order=4, num_tokens=3, prompts=prompts, alpha=0.8, prompt_shift=0.02)
    curves = [bk.frontier(many, num_draws=500, seed=seed) for seed in range(8)]
    for target in (0.1, 0.4):
        found = np.array([exact(many, curve.alpha_for(kl=target))["kl"] for curve in curves])
        z = (found.mean() - target) / (found.std(ddof=1) / np.sqrt(len(found)))
        assert abs(z) < 3.5
        assert found == pytest.approx(target, rel=0.15)
