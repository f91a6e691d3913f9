"""The path of posteriors from a pool of draws: identities on enumerated problems, and intervals that cover."""

from dataclasses import dataclass

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.frontier.best_of_n_curve import best_of_n_curve
from bayes_klrl.analysis.frontier.curves import QUANTITIES, Curves
from bayes_klrl.analysis.frontier.implied_alpha import gap, implied, monotone_root
from bayes_klrl.analysis.frontier.path import RewardPool, _sums_at, curves, moments
from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.problems import gold_posterior
from tests.helpers.truth import Truth, random_posterior


@dataclass(frozen=True)
class Law:
    """An enumerated prior: probabilities and rewards of its outcomes, (M,), rewards ascending."""

    p0: np.ndarray
    reward: np.ndarray

    @classmethod
    def of(cls, posterior: bk.Posterior) -> "Law":
        truth = Truth(posterior)
        order = np.argsort(truth.reward[0], kind="stable")
        return cls(np.exp(truth.log_prior[0][order]), truth.reward[0][order])

    def tilted(self, b: float) -> np.ndarray:
        p = self.p0 * np.exp(b * self.reward)
        return p / p.sum()

    def log_evidence(self, b: float) -> float:
        return float(np.log(self.p0 @ np.exp(b * self.reward)))

    def value(self, name: str, b: float, num: int) -> float:
        """The truth, straight from the definitions."""
        p = self.tilted(b)
        if name == "log_evidence":
            return self.log_evidence(b)
        if name == "reward":
            return float(p @ self.reward)
        if name == "kl":
            return float(p @ np.log(p / self.p0))
        return num / float(self.p0 @ (p / self.p0) ** 2)

    def pools(self, rng: np.random.Generator, shape: tuple[int, int]) -> RewardPool:
        """Prior draws: P independent pools of N."""
        drawn = np.searchsorted(self.p0.cumsum() / self.p0.sum(), rng.random(shape))
        return RewardPool(np.zeros(shape), self.reward[drawn])

    def whole(self) -> RewardPool:
        """Every outcome once, weighted, so that estimates are exact."""
        return RewardPool(np.log(self.p0 * len(self.p0)), self.reward)


class Gaussian(Law):
    """A standard normal reward: log Z = b^2 / 2."""

    def __init__(self) -> None:
        super().__init__(np.empty(0), np.empty(0))

    def value(self, name: str, b: float, num: int) -> float:
        return {"log_evidence": b**2 / 2, "reward": b, "kl": b**2 / 2, "ess": num * np.exp(-(b**2))}[name]

    def pools(self, rng: np.random.Generator, shape: tuple[int, int]) -> RewardPool:
        return RewardPool(np.zeros(shape), rng.standard_normal(shape))


GOLD = Law.of(gold_posterior())
RANDOM = [Law.of(random_posterior(seed)) for seed in range(3)]


def hits(estimates: Curves, name: str, truth: np.ndarray) -> np.ndarray:
    return (estimates.lower[name] <= truth) & (truth <= estimates.upper[name])


@pytest.mark.parametrize("law", [GOLD, *RANDOM])
def test_a_pool_of_every_outcome_is_exact(law: Law) -> None:
    bs = np.array([-2.0, -0.3, 0.0, 0.01, 0.7, 3.0, 20.0])
    mean, per_prompt = curves(law.whole(), bs)
    for name in ("log_evidence", "reward", "kl"):
        truth = [law.value(name, b, 1) for b in bs]
        np.testing.assert_allclose(getattr(mean, name), truth, rtol=1e-11, atol=1e-12)
        np.testing.assert_array_equal(getattr(per_prompt, name)[0], getattr(mean, name))


@pytest.mark.parametrize("law", [GOLD, *RANDOM])
@pytest.mark.parametrize("b", [-0.8, 0.2, 1.5])
def test_the_derivative_identities(law: Law, b: float) -> None:
    """theory.md 1.6: d log Z = R, dR = Var, dK = b Var, d(alpha log Z)/d alpha = -K, dR/dK = alpha, and the reverse KL."""
    h = 1e-4
    pool = law.whole()
    mean, _ = curves(pool, [b - h, b, b + h])
    left, middle, right = ({n: float(getattr(mean, n)[i]) for n in ("log_evidence", "reward", "kl")} for i in range(3))
    variance = moments(pool, b)[2]
    slope = {name: (right[name] - left[name]) / (2 * h) for name in middle}
    assert slope["log_evidence"] == pytest.approx(middle["reward"], abs=1e-6)
    assert slope["reward"] == pytest.approx(variance, abs=1e-6)
    assert slope["kl"] == pytest.approx(b * variance, abs=1e-6)
    assert slope["reward"] / slope["kl"] == pytest.approx(1 / b, rel=1e-5)
    alpha = 1 / b
    at = [a * law.log_evidence(1 / a) for a in (alpha - h, alpha + h)]
    assert (at[1] - at[0]) / (2 * h) == pytest.approx(-middle["kl"], abs=1e-6)
    prior_first = float(law.p0 @ np.log(law.p0 / law.tilted(b)))
    assert prior_first == pytest.approx(middle["log_evidence"] - b * float(law.p0 @ law.reward), abs=1e-12)


def test_the_gap_is_the_kl_to_the_nearest_posterior_on_the_path() -> None:
    """Pythagoras, for policies on both sides of the prior's mean, and for two prompts that share one b."""
    rng = np.random.default_rng(3)
    signs = set()
    for _ in range(40):
        laws = [GOLD, GOLD] if rng.random() < 0.5 else [GOLD]
        policies = [law.p0 ** rng.uniform(0.3, 2) * np.exp(rng.normal() * law.reward) for law in laws]
        policies = [q * rng.gamma(0.5, size=q.size) + 1e-12 for q in policies]
        policies = [q / q.sum() for q in policies]
        reward = np.mean([q @ law.reward for q, law in zip(policies, laws, strict=True)])
        kl = np.mean([q @ np.log(q / law.p0) for q, law in zip(policies, laws, strict=True)])
        whole = laws[0].whole()
        pool = RewardPool(np.repeat(whole.log_weights, len(laws), 0), np.repeat(whole.reward, len(laws), 0))
        found = gap(pool, float(reward), float(kl))
        b = found.implied.inverse_alpha
        expected = np.mean([q @ np.log(q / law.tilted(b)) for q, law in zip(policies, laws, strict=True)])
        assert found.value == pytest.approx(expected, abs=1e-10)
        for other in (b - 0.1, b + 0.1):
            assert (
                np.mean([q @ np.log(q / law.tilted(other)) for q, law in zip(policies, laws, strict=True)]) > expected
            )
        signs.add(np.sign(b))
        assert found.implied.alpha == 1 / b
    assert signs == {-1.0, 1.0}


# 4000 pools: a coverage of 0.95 is seen as 0.95 +- 0.0034. A cell counts where nine pools in ten are called valid: where
# few are, it is those whose tail came out short, and being called valid is itself evidence against them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "law, num",
    [(Gaussian(), 2000), (GOLD, 1000), *[(law, 1000) for law in RANDOM]],
    ids=["Gaussian", "gold", "random 0", "random 1", "random 2"],
)
def test_intervals_cover_where_they_are_called_valid(law: Law, num: int) -> None:
    bs = np.array([0.05, 0.3, 0.6, 1.2, 2.0, 3.0])
    rng = np.random.default_rng(11)
    pieces = [curves(law.pools(rng, (500, num)), bs)[1] for _ in range(8)]
    judged, valid_hits, valid_total = set(), 0, 0
    for name in QUANTITIES:
        truth = np.array([law.value(name, b, num) for b in bs])
        valid = np.concatenate([piece.valid[name] for piece in pieces])
        hit = np.concatenate([hits(piece, name, truth) for piece in pieces])
        for a in np.flatnonzero(valid.mean(axis=0) >= 0.9):
            coverage = hit[valid[:, a], a].mean()
            assert 0.93 <= coverage <= 0.97, (name, bs[a], coverage)
            judged.add(name)
        # What is called valid and misses, of all pools: never more than an interval may.
        assert ((valid & ~hit).mean(axis=0) <= 0.07).all(), name
        valid_hits, valid_total = valid_hits + (valid & hit).sum(), valid_total + valid.sum()
    assert judged >= {"log_evidence", "reward", "kl"}
    assert 0.93 <= valid_hits / valid_total <= 0.97


@pytest.mark.slow
def test_the_effective_sample_size_alone_would_call_bad_intervals_valid() -> None:
    """Why an interval needs 50 influential draws: at ESS 370 of 1000 the error of K rests on a handful."""
    law, rng = Gaussian(), np.random.default_rng(5)
    estimates = curves(law.pools(rng, (3000, 1000)), [1.0])[1]
    assert estimates.within.mean() > 0.99
    coverage = hits(estimates, "kl", np.array([0.5]))[estimates.within].mean()
    assert coverage < 0.93 - 4 * np.sqrt(0.05 * 0.95 / 3000)
    assert estimates.valid["kl"].mean() < 0.01


def test_many_prompts_make_the_bias_count() -> None:
    """800 prompts: the mean's error shrinks, its bias of -(e^(b^2) - 1) / 2 N does not, and rules its interval out."""
    pool = Gaussian().pools(np.random.default_rng(6), (800, 2000))
    for b, expected in ((0.3, True), (0.9, False)):
        mean, per_prompt = curves(pool, [b])
        assert mean.within.all()
        assert bool(mean.valid["log_evidence"][0]) is expected
        assert per_prompt.valid["log_evidence"].mean() > 0.6
        ratio = np.expm1(b**2) / (2 * 2000) / mean.se["log_evidence"][0]
        assert bool(ratio < 0.25) is expected


@pytest.mark.slow
def test_the_bias_that_the_rule_goes_by_is_the_bias() -> None:
    rng, b, num = np.random.default_rng(10), 0.5, 200
    sums = _sums_at(Gaussian().pools(rng, (40_000, num)), b)
    for name in QUANTITIES:
        error = sums.value[name] - Gaussian().value(name, b, num)
        if name == "ess":  # its interval, and so its bias, is one of log ESS
            error = num * np.exp(-(b**2)) * np.log1p(error / (num * np.exp(-(b**2))))
        se = error.std() / np.sqrt(error.size)
        assert abs(error.mean()) > 4 * se
        assert error.mean() == pytest.approx(sums.bias[name].mean(), rel=0.2, abs=4 * se), name


def test_one_prompt_out_of_reach_is_out_of_reach_for_the_mean() -> None:
    rng = np.random.default_rng(12)
    reward = rng.standard_normal((2, 1000)) * [[0.01], [1.0]]
    mean, per_prompt = curves(RewardPool(np.zeros((2, 1000)), reward), [2.5])
    assert mean.ess[0] > 400
    assert per_prompt.within.ravel().tolist() == [True, False]
    assert not mean.within[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_standard_errors_are_the_spread_over_pools(weighted: bool) -> None:
    """Of prior draws and of draws from another distribution, which the prior weighs."""
    rng = np.random.default_rng(7)
    law, num, bs = GOLD, 1500, np.array([0.4, 1.0])
    q = law.tilted(0.7) if weighted else law.p0 / law.p0.sum()
    drawn = np.searchsorted(q.cumsum() / q.sum(), rng.random((1500, num)))
    estimates = curves(RewardPool(np.log(law.p0 / q)[drawn], law.reward[drawn]), bs)[1]
    for name in QUANTITIES:
        value, se = getattr(estimates, name), estimates.se[name]
        np.testing.assert_allclose(np.sqrt(np.square(se).mean(axis=0)), value.std(axis=0), rtol=0.08)  # sd of sd: 1.8 %
        if name != "ess" or not weighted:
            truth = np.array([law.value(name, b, num) for b in bs])
            z = (value.mean(axis=0) - truth) / (value.std(axis=0) / np.sqrt(len(value)))
            bias = np.abs(value.mean(axis=0) - truth) / value.std(axis=0)
            assert ((np.abs(z) < 4) | (bias < 0.15)).all(), (name, z, bias)  # O(1/N) bias is legal, and small


def test_the_kl_of_a_pool_stays_below_log_n_and_is_marked_near_it() -> None:
    pool = Gaussian().pools(np.random.default_rng(0), (50, 400))
    bs = np.geomspace(0.1, 1e6, 60)
    mean, per_prompt = curves(pool, bs)
    assert (per_prompt.kl <= np.log(400) + 1e-9).all()
    assert per_prompt.kl[:, -1] == pytest.approx(np.log(400))
    assert per_prompt.within.any()
    assert per_prompt.kl[per_prompt.within].max() <= np.log(400) - np.log(100) < np.log(400) - 3
    assert not mean.within[bs**2 / 2 > np.log(400)].any()
    assert (np.diff(per_prompt.kl, axis=1) >= -1e-9).all()


def test_ess_is_what_two_evidences_say() -> None:
    pool = GOLD.pools(np.random.default_rng(1), (3, 500))
    _, once = curves(pool, [0.9])
    _, twice = curves(pool, [1.8])
    np.testing.assert_allclose(once.ess, 500 * np.exp(2 * once.log_evidence - twice.log_evidence), rtol=1e-12)


def test_impossible_draws_belong_to_the_base_measure() -> None:
    """-inf: as if the prior were constrained, at every b of either sign; only log Z and KL know of its mass."""
    rng = np.random.default_rng(2)
    reward = rng.standard_normal(1000)
    reward[:300] = -np.inf
    bs = [-1.0, 0.0, 1e-9, 1.0, 300.0]
    mean, _ = curves(RewardPool(np.zeros(1000), reward), bs)
    kept, _ = curves(RewardPool(np.zeros(700), reward[300:]), bs)
    np.testing.assert_allclose(mean.reward, kept.reward)
    np.testing.assert_allclose(mean.log_evidence, kept.log_evidence + np.log(0.7))
    np.testing.assert_allclose(mean.kl, kept.kl - np.log(0.7))
    assert mean.kl[1] == pytest.approx(-np.log(0.7))


def test_large_rewards_and_cold_temperatures_lose_no_digits() -> None:
    reward = 1e6 + np.array([0.0, 1.0, 2.0, 2.0])
    mean, _ = curves(RewardPool(np.zeros(4), reward), [1e-3, 1e12, -1e12])
    assert mean.kl[1] == pytest.approx(np.log(2), abs=1e-12)
    assert mean.kl[2] == pytest.approx(np.log(4), abs=1e-12)
    shifted, _ = curves(RewardPool(np.zeros(4), reward - 1e6), [1e-3])
    assert mean.kl[0] == pytest.approx(shifted.kl[0], rel=1e-9)


@pytest.mark.parametrize("expected", [0.5, 1.0, 2.0, 3.0])
def test_with_bounds_a_level_that_may_be_unseen_costs_no_coverage(expected: float) -> None:
    """A highest level that 500 draws show `expected` times on average: an interval covers, or is not called valid.

    Without the bounds more than half of all intervals are valid and wrong at a cold alpha, where its loss is largest.
    """
    num, p = 500, expected / 500
    law, bs = Law(np.array([0.5, 0.5 - p, p]), np.array([0.0, 1.0, 3.0])), np.array([0.05, 0.2, 0.5, 1.0, 2.0, 4.0])
    plain = law.pools(np.random.default_rng(0), (2000, num))
    wrong = {}
    for bounds in (None, (0.0, 3.0)):
        estimates = curves(RewardPool(plain.log_weights, plain.reward, bounds), bs)[1]
        for name in ("log_evidence", "reward", "kl"):
            missed = estimates.valid[name] & ~hits(estimates, name, np.array([law.value(name, b, num) for b in bs]))
            wrong[bounds, name] = missed.mean(axis=0)
    assert max(wrong[(0.0, 3.0), name].max() for name in ("log_evidence", "reward", "kl")) < 0.07
    assert wrong[None, "log_evidence"][-1] > 0.9 * np.exp(-expected)


def test_bounds_just_above_what_was_drawn_cost_no_interval() -> None:
    """A reward that is spread up to its bounds: almost every interval that was valid without them still is."""
    plain = RewardPool(np.zeros((200, 1000)), np.random.default_rng(1).random((200, 1000)))
    bs = np.array([-6.0, 0.5, 2.0, 6.0, 10.0])
    without, bounded = (curves(RewardPool(plain.log_weights, plain.reward, b), bs)[1] for b in (None, (0.0, 1.0)))
    for name in QUANTITIES:
        assert without.valid[name].sum() - bounded.valid[name].sum() <= 0.01 * bounded.valid[name].size
    assert np.isnan(plain.headroom(1.0)).all()
    assert (RewardPool(plain.log_weights, plain.reward, (-1.0, 1.0)).headroom(-1.0) < -1).all()


def test_how_far_an_unseen_mass_moves_each_estimate_is_that_of_the_mixture() -> None:
    """Against a pool that has the missing draws: N of the old weigh 1 - 3 / N, and three at the bound 1 / N each."""
    num, b, high = 300, 1.3, 2.5
    reward = np.random.default_rng(3).uniform(0, 1, num)
    pool = RewardPool(np.zeros(num), reward, (0.0, high))
    weights = np.concatenate([np.full(num, 1 - 3 / num), np.ones(3)])
    more = RewardPool(np.log(weights) + np.log((num + 3) / num), np.append(reward, [high] * 3))
    before, after = (curves(each, [b])[1] for each in (pool, more))
    moved = _sums_at(pool, b).unseen
    for name in ("log_evidence", "reward", "kl"):
        assert moved[name][0] == pytest.approx(abs(getattr(after, name) - getattr(before, name))[0, 0], rel=1e-9)


def test_a_reward_that_never_varies_has_no_reliable_interval() -> None:
    mean, _ = curves(RewardPool(np.zeros(1000), np.full(1000, 2.0)), [1.0])
    assert mean.log_evidence[0] == 2.0
    assert not any(mean.valid[name].any() for name in QUANTITIES)


@pytest.mark.parametrize(
    "log_weights, reward, match",
    [
        (np.zeros(1), np.zeros(1), "at least N = 2"),
        (np.zeros(3), np.zeros(4), "one shape"),
        (np.zeros(3), np.array([0.0, np.nan, 1.0]), "NaN"),
        (np.zeros(3), np.array([0.0, np.inf, 1.0]), "inf"),
        (np.array([0.0, np.nan]), np.zeros(2), "Log-weights"),
        (np.zeros((2, 2)), np.array([[0.0, 1.0], [-np.inf, -np.inf]]), "prompt 1"),
    ],
)
def test_what_is_no_pool(log_weights: np.ndarray, reward: np.ndarray, match: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=match):
        RewardPool(log_weights, reward)


@pytest.mark.slow
def test_the_error_of_the_implied_alpha_and_of_the_gap() -> None:
    """Over pools, for a policy whose reward and KL are known, then for one that is sampled as well."""
    law, rng = GOLD, np.random.default_rng(8)
    b, num = 1.2, 1500
    reward, kl = law.value("reward", b, 1), law.value("kl", b, 1) + 0.3
    pools = law.pools(rng, (150, num))
    one = [gap(RewardPool(lw, r), reward, kl) for lw, r in zip(pools.log_weights, pools.reward, strict=True)]
    z_b = np.array([(each.implied.inverse_alpha - b) / each.implied.inverse_alpha_se for each in one])
    z_gap = np.array([(each.value - 0.3) / each.se for each in one])
    noisy = []
    for lw, r in zip(pools.log_weights, pools.reward, strict=True):
        x = rng.choice(law.p0.size, size=400, p=law.tilted(b))
        ratio = 0.3 + np.log(law.tilted(b) / law.p0)[x]  # log q / p0 of a policy 0.3 nats worse than its reward says
        sample = np.stack([law.reward[x], ratio])
        (rr, rk), (_, kk) = np.cov(sample) / 400
        noisy.append(
            gap(RewardPool(lw, r), sample[0].mean(), sample[1].mean(), reward_se=rr**0.5, kl_se=kk**0.5, covariance=rk)
        )
    z_noisy = np.array([(each.value - 0.3) / each.se for each in noisy])
    z_alpha = np.array([(each.implied.inverse_alpha - b) / each.implied.inverse_alpha_se for each in noisy])
    for z in (z_b, z_gap, z_noisy, z_alpha):
        assert abs(z.mean()) < 4 / np.sqrt(150)
        assert 0.8 < z.std() < 1.23  # sd of a sd of 150: 0.058


def test_no_posterior_has_a_reward_outside_the_pool() -> None:
    pool = GOLD.pools(np.random.default_rng(0), (1, 100))
    for reward in (-50.0, 50.0, float(pool.reward.max())):
        with pytest.raises(bk.BayesKLRLError, match="rewards reach from"):
            implied(pool, reward)
    for wrong in (np.nan, np.inf, "1"):
        with pytest.raises(bk.BayesKLRLError, match="finite number"):
            implied(pool, wrong)  # type: ignore[arg-type]


def test_roots_of_monotone_functions() -> None:
    assert monotone_root(lambda x: x - 700.0, start=1.0) == pytest.approx(700.0, rel=1e-12)
    assert monotone_root(lambda x: x + 1e-7, start=1.0) == pytest.approx(-1e-7, rel=1e-9)
    assert monotone_root(lambda x: x - 1e-7, start=1.0, low=0.0) == pytest.approx(1e-7, rel=1e-9)
    assert monotone_root(np.tanh, start=1.0, low=-1.0) == pytest.approx(0.0, abs=1e-12)
    assert monotone_root(lambda x: np.tanh(x) - 2, start=1.0) is None
    assert monotone_root(lambda x: np.tanh(x) + 2, start=1.0) is None


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_best_of_n_against_its_law(n: int) -> None:
    """E[max of n] and the KL between levels, from F^n; errors by z-score and spread over pools."""
    law, rng = GOLD, np.random.default_rng(9)
    levels, start = np.unique(law.reward, return_index=True)
    p = np.add.reduceat(law.p0, start)
    best = np.diff(p.cumsum() ** n, prepend=0.0)
    reward, kl = float(best @ levels), float(best @ np.log(best / p))
    pools = law.pools(rng, (400, 1000))
    each = [best_of_n_curve(RewardPool(lw, r), [n]) for lw, r in zip(pools.log_weights, pools.reward, strict=True)]
    z = np.array([(curve.reward[0] - reward) / curve.reward_se[0] for curve in each])
    assert abs(z.mean()) < 0.25  # the with-replacement form is biased by O(n / N)
    assert 0.87 < z.std() < 1.15
    assert np.mean([curve.kl[0] for curve in each]) == pytest.approx(kl, abs=0.02)
    assert kl <= np.log(n) - (n - 1) / n + 1e-12
    whole = best_of_n_curve(law.whole(), [n])
    assert whole.reward[0] == pytest.approx(reward, rel=1e-9)
    assert whole.kl[0] == pytest.approx(kl, rel=1e-9, abs=1e-12)


def test_best_of_n_is_not_above_the_frontier_and_fails_where_draws_may_be_impossible() -> None:
    pool = GOLD.pools(np.random.default_rng(4), (2, 2000))
    curve = best_of_n_curve(pool)
    assert curve.n.tolist() == [1, 2, 4, 8, 16, 32]
    for reward, kl in zip(curve.reward[1:], curve.kl[1:], strict=True):
        assert gap(pool, float(reward), float(kl)).value > 0
    reward = pool.reward.copy()
    reward[0, 0] = -np.inf
    assert np.isneginf(best_of_n_curve(RewardPool(pool.log_weights, reward), [2, 4]).reward).all()
    with pytest.raises(bk.BayesKLRLError, match="n must be"):
        best_of_n_curve(pool, [0])


def test_path_points_interpolate_the_enumerated_truth() -> None:
    nodes = np.linspace(0, 4, 21)
    truth = {name: np.array([GOLD.value(name, b, 1) for b in nodes]) for name in ("log_evidence", "reward")}
    points = PathPoints(nodes, truth["log_evidence"], truth["reward"], reward_se=np.full(21, 0.1))
    at_nodes = points.at(nodes)
    np.testing.assert_allclose(at_nodes["kl"][0], [GOLD.value("kl", b, 1) for b in nodes], atol=1e-10)
    between = np.array([0.07, 1.234, 3.9])
    found = points.at(between)
    for name, tolerance in (("log_evidence", 1e-4), ("reward", 0.01), ("kl", 0.02)):
        np.testing.assert_allclose(found[name][0], [GOLD.value(name, b, 1) for b in between], atol=tolerance)
    assert found["reward_se"][0] == pytest.approx(0.1, rel=1e-3)
    assert np.isnan(found["kl_se"]).all()
    assert np.isnan(points.at(np.array([4.1]))["kl"]).all()
    assert (points.first, points.last) == (0.0, 4.0)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (([0.0, 1.0, 1.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]), "increase"),
        (([-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]), "increase"),
        (([0.0, 1.0], [0.0, 1.0], [1.0, np.nan]), "finite"),
        (([0.0, 1.0], [0.0, 1.0], [1.0]), "shape"),
        (([0.0], [0.0], [1.0]), "M = 2"),
        (([0.0, 1.0], [[0.0, 1.0]] * 2, [[0.0, 1.0]]), "shape"),
    ],
)
def test_what_are_no_path_points(arguments: tuple[list[float], ...], match: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=match):
        PathPoints(*(np.array(each) for each in arguments))
