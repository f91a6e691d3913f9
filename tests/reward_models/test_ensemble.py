"""The posteriors of an uncertain reward by enumeration, who is moved by a shift, and what its uncertainty does to draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.problems import gold_table
from bayes_klrl.reward_models.ensemble import ensemble_of
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.reward_models.model import diagnosed
from bayes_klrl.reward_models.posterior import RewardPosterior
from tests.helpers.truth import Truth, chi_square_p, counts, z_score

PRIOR = bk.NgramLM(gold_table(-0.5), eos_token_id=3)
ALPHA, NUM_TOKENS = 0.8, 5
PROMPTS = [[0], [1]]


def features(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.stack([((tokens == 2) & inside).sum(axis=1), lengths, tokens[:, 0] == 1], axis=1)


def made(seed: int = 0, **changes: Any) -> RewardPosterior:
    """A posterior of theta without running a chain: four of its draws' chains are independent normals."""
    draws = np.array([0.8, -0.2, 0.5]) + 0.4 * np.random.default_rng(seed).standard_normal((4, 50, 3))
    function = FeatureMap(bk.TokenFeatures(features), np.array([1.0, 3.0, 0.5]), None, np.array([0.9, 1.2, 0.5]))
    parts: dict[str, Any] = {
        "draws": draws,
        "scales": {},
        "diagnostics": diagnosed(draws, {}, 0),
        "sample_stats": {},
        "features": function,
        "prior": PRIOR,
        "design": np.zeros((1, 3)),
    }
    return RewardPosterior(**{**parts, **changes})


MODEL = made()


def posterior(target: str = "cut", model: RewardPosterior = MODEL, **options: Any) -> bk.Posterior:
    reward = bk.EnsembleReward(model, **{"alpha": ALPHA, "target": target, "num_thetas": 20, **options})
    return bk.Posterior(PRIOR, reward, prompts=PROMPTS, max_new_tokens=NUM_TOKENS)


PLAIN = Truth(posterior("plug-in"))
P0 = np.exp(PLAIN.log_prior)  # (P, N)


def member_rewards(model: RewardPosterior = MODEL, num: int = 20) -> np.ndarray:
    """r_theta of every completion, (P, S, N), by the definition."""
    thetas = model.draws.reshape(-1, 3)[((np.arange(num) + 0.5) * 200 / num).astype(int)]
    f = np.stack([features(t, n) for t, n in zip(PLAIN.sequences.tokens, PLAIN.sequences.lengths, strict=True)])
    z = (f - model.features.mean) / model.features.scale
    return np.einsum("sj,pnj->psn", thetas, z)


def definition(target: str, rewards: np.ndarray, alpha: float = ALPHA, phi: np.ndarray | float = 1.0) -> np.ndarray:
    """The four targets on every completion, (P, N)."""
    base = P0 * phi
    tilted = base[:, None] * np.exp(rewards / alpha)
    if target == "cut":
        return (tilted / tilted.sum(axis=2, keepdims=True)).mean(axis=1)
    if target == "joint":
        p = tilted.mean(axis=1)
    else:
        r = rewards.mean(axis=1) - (0.7 * rewards.std(axis=1) if target == "conservative" else 0)
        p = base * np.exp(r / alpha)
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def anchored(rewards: np.ndarray) -> np.ndarray:
    """Each r_theta less its prior mean."""
    return rewards - np.einsum("psn,pn->ps", rewards, P0)[..., None]


OPTIONS: dict[str, dict[str, Any]] = {
    "cut": {},
    "plug-in": {},
    "joint": {"anchor": "mean"},
    "conservative": {"anchor": "mean", "caution": 0.7},
}


@pytest.mark.parametrize("target", OPTIONS)
def test_each_target_is_its_definition(target: str) -> None:
    rewards = member_rewards()
    expected = definition(target, anchored(rewards) if "anchor" in OPTIONS[target] else rewards)
    np.testing.assert_allclose(Truth(posterior(target, **OPTIONS[target])).p, expected, rtol=1e-10, atol=0)


def test_cut_is_the_mixture_of_the_posteriors_of_each_theta() -> None:
    """Each of them a `Posterior` of its own, at 1e-10."""
    rewards = member_rewards()
    each = []
    for s in range(20):
        table = {tuple(x): rewards[:, s, n] for n, x in enumerate(PLAIN.xs)}

        def of_one(
            tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray, table: dict[Any, Any] = table
        ) -> list[float]:
            rows = zip(tokens.tolist(), lengths, prompt_index, strict=True)
            return [table[tuple(row[:length])][p] for row, length, p in rows]

        each.append(
            Truth(
                bk.Posterior(PRIOR, bk.TokenReward(of_one, alpha=ALPHA), prompts=PROMPTS, max_new_tokens=NUM_TOKENS)
            ).p
        )
    np.testing.assert_allclose(Truth(posterior()).p, np.mean(each, axis=0), rtol=1e-10, atol=0)
    exact = bk.Exact().run(posterior(), seed=0)
    np.testing.assert_allclose(exact.log_evidence, 0, atol=1e-12)  # a mixture of normalised ones


def shifted(model: RewardPosterior) -> RewardPosterior:
    """The same rewards but for a constant, another one for each theta: by a feature that never varies."""

    def more(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.concatenate([features(tokens, lengths), np.ones((len(lengths), 1))], axis=1)

    constants = np.random.default_rng(5).standard_normal((4, 50, 1))
    old = model.features
    return replace(
        model,
        draws=np.concatenate([model.draws, constants], axis=2),
        features=FeatureMap(bk.TokenFeatures(more), np.append(old.mean, 0.0), None, np.append(old.scale, 1.0)),
        design=np.zeros((1, 4)),
    )


@pytest.mark.parametrize("target", OPTIONS)
def test_a_constant_added_to_each_theta_moves_nothing_but_what_has_no_anchor(target: str) -> None:
    def moved(**options: Any) -> float:
        before, after = Truth(posterior(target, **options)).p, Truth(posterior(target, shifted(MODEL), **options)).p
        return float(0.5 * np.abs(before - after).sum(axis=1).max())

    assert moved(**OPTIONS[target]) < 1e-12
    if "anchor" in OPTIONS[target]:
        assert moved(**{**OPTIONS[target], "anchor": "none"}) > 0.01


def test_other_factors_belong_to_the_base_measure() -> None:
    """log Z_theta is that of the whole likelihood: the mixture of p*_theta given the constraint, at equal weights."""
    no_end = bk.Constraint(lambda completion_ids: [ids[-1] != 3 for ids in completion_ids])
    longer = bk.TokenReward(lambda tokens, lengths: 0.3 * tokens[:, 0], alpha=0.5)
    reward = bk.EnsembleReward(MODEL, alpha=ALPHA, num_thetas=20)
    for likelihood in (reward * no_end * longer, longer * no_end * reward):
        both = bk.Posterior(PRIOR, likelihood, prompts=PROMPTS, max_new_tokens=NUM_TOKENS)
        first = PLAIN.sequences.tokens[..., 0]
        finished = PLAIN.sequences.finished({3})
        expected = definition("cut", member_rewards(), phi=np.exp(0.6 * first) * ~finished)
        np.testing.assert_allclose(Truth(both).p, expected, rtol=1e-10)
    with pytest.raises(bk.BayesKLRLError, match="takes one EnsembleReward"):
        bk.Posterior(PRIOR, reward * reward, max_new_tokens=3)


def test_another_alpha_is_measured_anew() -> None:
    tempered = bk.EnsembleReward(MODEL, alpha=2 * ALPHA, num_thetas=20) ** 2.0
    again = bk.Posterior(PRIOR, tempered, prompts=PROMPTS, max_new_tokens=NUM_TOKENS)
    np.testing.assert_allclose(Truth(again).p, definition("cut", member_rewards()), rtol=1e-10)
    out_of_one = bk.Posterior(PRIOR, posterior().likelihood ** 0.5, prompts=PROMPTS, max_new_tokens=NUM_TOKENS)
    np.testing.assert_allclose(Truth(out_of_one).p, definition("cut", member_rewards(), 2 * ALPHA), rtol=1e-10)
    for target in ("cut", "joint"):
        with pytest.raises(bk.BayesKLRLError, match="itself changes with alpha"):
            bk.frontier(posterior(target, **OPTIONS[target]), num_draws=100, seed=0)
    assert bk.frontier(posterior("plug-in"), num_draws=100, seed=0).alpha == ALPHA


def test_another_prior_and_other_prompts_are_measured_anew() -> None:
    other = bk.NgramLM(gold_table(0.5), eos_token_id=3)
    moved = bk.Posterior(other, posterior().likelihood, prompts=PROMPTS[1:], max_new_tokens=4)
    assert bk.Exact().run(moved, seed=0).log_evidence[0] == pytest.approx(0, abs=1e-12)


# A pool in place of enumeration


def test_a_pool_estimates_the_evidence_of_every_theta() -> None:
    exact = ensemble_of(posterior()).anchors
    z = []
    for seed in range(40):
        anchors = ensemble_of(posterior(max_sequences=0, num_draws=1000, seed=seed)).anchors
        assert not anchors.exact
        z.append((np.exp(anchors.log_evidence - exact.log_evidence) - 1) / anchors.log_evidence_se)
        mean_error = anchors.mean - exact.mean
        assert np.abs(mean_error).max() < 0.25
    z_all = np.array(z)  # of one pool they go together
    assert abs(z_score(z_all.mean(axis=(1, 2)), 0.0)) < 4
    assert 0.7 < np.sqrt(np.square(z_all).mean()) < 1.3
    assert exact.exact
    assert (exact.log_evidence_se == 0).all()


def test_by_a_pool_the_mixture_is_nearly_equal() -> None:
    """The target is then the mixture with weights Z / Z-hat, exactly."""
    pooled = posterior(max_sequences=0, num_draws=2000)
    exact, estimate = ensemble_of(posterior()).anchors, ensemble_of(pooled).anchors
    rewards = member_rewards()
    tilted = P0[:, None] * np.exp(rewards / ALPHA)
    expected = (tilted / np.exp(estimate.log_evidence)[..., None]).mean(axis=1)
    expected /= expected.sum(axis=1, keepdims=True)
    found = Truth(pooled).p
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    total_variation = 0.5 * np.abs(found - definition("cut", rewards)).sum(axis=1)
    assert (total_variation < np.abs(estimate.log_evidence - exact.log_evidence).mean(axis=1)).all()
    assert (total_variation < 0.02).all()


def test_a_pool_that_is_too_small_is_refused() -> None:
    cold = posterior(max_sequences=0, num_draws=30, alpha=0.05)
    with pytest.raises(
        bk.BayesKLRLError,
        match=r"log Z of theta \d+ for prompt \d rests on \d\.\d eff.*larger pool.*larger alpha than 0\.05",
    ):
        bk.ImportanceSampling(10).run(cold, seed=0)
    bk.ImportanceSampling(10).run(posterior("plug-in", max_sequences=0, num_draws=30, alpha=0.05), seed=0)


# Every algorithm


@pytest.mark.slow
def test_algorithms_sample_the_cut_posterior() -> None:
    target = posterior()
    truth = Truth(target)
    expected = float(truth.p[0] @ truth.sequences.lengths[0])
    for algorithm in (bk.ImportanceSampling(500), bk.SMC(200)):
        estimates = [algorithm.run(target, seed=seed) for seed in range(40)]
        lengths = np.array([draws.mean(draws.lengths)[0] for draws in estimates])
        assert abs(z_score(lengths, expected)) < 4
        assert abs(z_score(np.array([np.exp(d.log_evidence[0]) for d in estimates]), 1.0)) < 4
    chain = bk.SuffixMH(num_chains=400, num_draws=1, num_warmup=60).run(target, seed=0)
    assert chi_square_p(counts(truth, chain.tokens[0]), truth.p[0]) > 0.001


def test_text_features_and_a_text_prior() -> None:
    letters = bk.NgramLM.fit(["ab", "ba", "aab", "b", "abba"], order=2)
    draws = np.random.default_rng(0).standard_normal((4, 50, 2))
    function = bk.RewardModel(lambda completions: [[len(c), c.count("a")] for c in completions]).features
    model = replace(
        MODEL,
        draws=draws,
        prior=letters,
        design=np.zeros((1, 2)),
        features=FeatureMap(function, np.array([2.0, 1.0]), None, np.array([1.0, 1.0])),
    )
    reward = model.reward(0.5, num_thetas=30)
    target = bk.Posterior(letters, reward, max_new_tokens=4)
    draw = bk.SMC(50).run(target, seed=0)
    assert ensemble_of(target).rewards(draw).shape == (1, 30, 50)
    table = bk.reward_uncertainty(target, draw).table()
    assert {"text", "reward_mean", "reward_sd", "inclusion_mean", "inclusion_sd"} <= set(table.columns)
    with pytest.raises(bk.TextRewardError, match="no tokenizer"):
        bk.Posterior(PRIOR, reward, max_new_tokens=4)


# What is uncertain about draws


def test_variances_are_those_of_enumeration() -> None:
    target = posterior()
    exact = bk.Exact().run(target, seed=0)
    order = [PLAIN.xs.index(x) for x in exact.sequences.lists()[: len(PLAIN.xs)]]
    found = bk.reward_uncertainty(target, exact)
    rewards = member_rewards()[:, :, order]
    tilted = P0[:, None, order] * np.exp(rewards / ALPHA)
    members = tilted / tilted.sum(axis=2, keepdims=True)  # p*_theta
    np.testing.assert_allclose(found.weights, members, rtol=1e-9)
    np.testing.assert_allclose(found.inclusion_mean, members.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.inclusion_sd, members.std(axis=1), rtol=1e-6)
    free = rewards - np.einsum("psn,pn->ps", rewards, P0[:, order])[..., None]
    np.testing.assert_allclose(found.reward_mean, free.mean(axis=1), atol=1e-10)
    np.testing.assert_allclose(found.reward_sd, free.std(axis=1), atol=1e-10)
    f = np.asarray(exact.lengths, dtype=np.float64)
    parts = found.decompose(f)
    cut = members.mean(axis=1)
    mean = (cut * f).sum(axis=1)
    np.testing.assert_allclose(parts.total, (cut * np.square(f - mean[:, None])).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(parts.mean, mean, rtol=1e-12)
    of_each = np.einsum("psn,pn->ps", members, f)
    np.testing.assert_allclose(parts.reward, of_each.var(axis=1), rtol=1e-9)
    np.testing.assert_allclose(parts.generation + parts.reward, parts.total, rtol=1e-12)
    assert ((parts.share > 0) & (parts.share < 1)).all()
    assert np.isnan(found.ess).all()


@pytest.mark.parametrize("target", ["cut", "plug-in"])
@pytest.mark.parametrize("algorithm", [bk.ImportanceSampling(1000), bk.Exact(num_draws=1000)], ids=["IS", "equal"])
def test_draws_of_any_kind_estimate_the_variances(algorithm: bk.Algorithm, target: str) -> None:
    """Whatever target the draws are of, p*_theta is what they are reweighted to."""
    truth = bk.reward_uncertainty(posterior(), exact := bk.Exact().run(posterior(), seed=0)).decompose(exact.lengths)
    at = posterior(target)
    runs, least = [], []
    for seed in range(40):
        draws = algorithm.run(at, seed=seed)
        found = bk.reward_uncertainty(at, draws)
        least.append(found.ess.min())
        parts = found.decompose(draws.lengths)
        runs.append((parts.mean[0], parts.generation[0], parts.reward[0]))
    mean, generation, reward = np.array(runs).T
    assert abs(z_score(mean, truth.mean[0])) < 4
    assert generation.mean() == pytest.approx(truth.generation[0], rel=0.02)  # biased by order 1 / ESS
    assert reward.mean() == pytest.approx(truth.reward[0], abs=3 * truth.total[0] / np.min(least))


def test_a_known_reward_leaves_nothing_to_the_reward() -> None:
    certain = made(draws=np.broadcast_to(np.array([0.8, -0.2, 0.5]), (4, 50, 3)))
    target = posterior(model=certain)
    draws = bk.SMC(100).run(target, seed=0)
    parts = bk.reward_uncertainty(target, draws).decompose(draws.lengths)
    np.testing.assert_allclose(parts.reward, 0, atol=1e-20)
    np.testing.assert_allclose(parts.generation, draws.mean(draws.lengths**2) - draws.mean(draws.lengths) ** 2)


# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "a"}, "needs a bk.RewardPosterior"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"target": "bayes"}, "target is one of"),
        ({"anchor": "max", "target": "joint"}, "anchor one of"),
        (
            {"target": "joint"},
            'preferences leave that constant open, so without an anchor it is not defined.*anchor="none"',
        ),
        ({"target": "conservative"}, "without an anchor it is not defined"),
        ({"num_thetas": 201}, "201 draws of theta were asked for, and there are 200"),
        ({"num_draws": 1}, "num_draws must be"),
        ({"caution": np.nan}, "caution must be"),
    ],
)
def test_bad_ensembles(options: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.EnsembleReward(**{"model": MODEL, "alpha": 1.0, **options})


def test_scores_need_no_anchor() -> None:
    from_scores = made(scores=np.zeros(1), noise=np.ones(1))
    found = Truth(posterior("joint", from_scores)).p
    np.testing.assert_allclose(found, definition("joint", member_rewards()), rtol=1e-10)


def test_what_belongs_to_no_posterior_has_no_anchors() -> None:
    free = bk.EnsembleReward(MODEL, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"put it into a bk.Posterior"):
        _ = free.anchors
    certain = bk.Posterior(PRIOR, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match=r"no bk.EnsembleReward"):
        bk.reward_uncertainty(certain, bk.ImportanceSampling(3).run(certain, seed=0))
    target = posterior()
    draws = bk.ImportanceSampling(3).run(target, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="another posterior"):
        bk.reward_uncertainty(posterior(alpha=2.0), draws)
    with pytest.raises(bk.BayesKLRLError, match=r"shape \(P, N\) = \(2, 3\)"):
        bk.reward_uncertainty(target, draws).decompose(np.ones(3))


@pytest.mark.slow
def test_svi_and_certificates_of_the_cut_posterior() -> None:
    """Trained on a torch table, and certified: both see the cut reward as any other."""
    target = bk.Posterior(PRIOR, bk.EnsembleReward(MODEL, alpha=ALPHA, num_thetas=20), max_new_tokens=NUM_TOKENS)
    fit = bk.SVI(num_steps=150, learning_rate=0.05).fit(target, seed=0)
    kl = Truth(target).kl(fit.guide)
    assert kl[0] < 0.05 < Truth(target).kl(PRIOR)[0]
    certificate = bk.certify(target, fit.guide, seed=0)
    assert certificate.reverse_kl[0, 0] <= kl[0] <= certificate.reverse_kl[0, 1]
    low, high = certificate.log_evidence_bounds[0]
    assert low <= 1e-9
    assert high >= -1e-9
