"""What draws say of the evidence, of expectations, and how they are handed on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.weights import logmeanexp
from tests.helpers.user_models import RecurrentLM, TextLM

REWARD = bk.Reward(lambda completions: [text.count("1") for text in completions], alpha=0.5)
POSTERIOR = bk.Posterior(TextLM(), REWARD, prompts=["0", "12"], max_new_tokens=4)
WEIGHTED = {
    "IS": bk.ImportanceSampling(300),
    "IS from another model": bk.ImportanceSampling(300, proposal=TextLM(seed=1)),
    "SMC": bk.SMC(100),
    "SMC from another model": bk.SMC(100, proposal=TextLM(seed=1), ess_threshold=1.0),
    "Exact": bk.Exact(),
}
EQUAL = {"best of n": bk.BestOfN(4, 50), "Exact draws": bk.Exact(num_draws=50)}
ALL = WEIGHTED | EQUAL


@pytest.fixture(scope="module")
def runs() -> dict[str, bk.Draws]:
    return {name: algorithm.run(POSTERIOR, seed=3) for name, algorithm in ALL.items()}


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_mean_weight_is_the_evidence(runs: dict[str, bk.Draws], name: str) -> None:
    np.testing.assert_allclose(logmeanexp(runs[name].log_weights), runs[name].log_evidence, rtol=1e-12)


@pytest.mark.parametrize("name", ["IS", "IS from another model", "Exact"])
def test_a_weight_is_joint_over_proposal(runs: dict[str, bk.Draws], name: str) -> None:
    draws = runs[name]
    expected = draws.log_prior + draws.log_likelihood - draws.log_proposal
    np.testing.assert_allclose(draws.log_weights, expected, atol=1e-12)


def test_from_the_prior_a_log_weight_is_exactly_reward_over_alpha(runs: dict[str, bk.Draws]) -> None:
    np.testing.assert_array_equal(runs["IS"].log_weights, runs["IS"].reward / 0.5)


@pytest.mark.parametrize("name", EQUAL)
def test_other_draws_weigh_equally(runs: dict[str, bk.Draws], name: str) -> None:
    assert (runs[name].log_weights == 0).all()
    known = runs["Exact"].log_evidence if name == "Exact draws" else np.full(2, np.nan)
    np.testing.assert_array_equal(runs[name].log_evidence, known)


@pytest.mark.parametrize("name", ALL)
def test_what_draws_carry_is_what_the_posterior_says_of_them(runs: dict[str, bk.Draws], name: str) -> None:
    draws = runs[name]
    np.testing.assert_allclose(draws.log_prior, POSTERIOR.log_prior(draws), atol=1e-12)
    np.testing.assert_array_equal(draws.reward, POSTERIOR.reward(draws))
    np.testing.assert_array_equal(draws.log_likelihood, draws.reward / draws.alpha)
    assert (draws.tokens[~draws.sequences.mask] == 3).all()
    assert draws.method == type(ALL[name]).__name__
    assert draws.prompts == ("0", "12")
    for array in (draws.reward, draws.log_prior, draws.log_likelihood, draws.log_weights):
        assert array.dtype == np.float64
        assert not np.isnan(array).any()


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_draws_and_another_seed_others(runs: dict[str, bk.Draws], name: str) -> None:
    again, other = (ALL[name].run(POSTERIOR, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(again.tokens, runs[name].tokens)
    np.testing.assert_array_equal(again.log_weights, runs[name].log_weights)
    assert (other.tokens == again.tokens).all() == (name == "Exact")


def test_the_mean_is_the_self_normalised_one(runs: dict[str, bk.Draws]) -> None:
    draws = runs["IS"]
    w = np.exp(draws.log_weights)
    f = np.random.default_rng(0).normal(size=(*draws.shape, 2))
    expected = (w[..., None] * f).sum(axis=1) / w.sum(axis=1)[:, None]
    np.testing.assert_allclose(draws.mean(f), expected, rtol=1e-10)
    np.testing.assert_allclose(draws.mean(f[..., 0]), expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(draws.mean(draws.reward), draws.mean(lambda texts: [t.count("1") for t in texts]))


def test_equally_weighted_draws_have_the_plain_mean(runs: dict[str, bk.Draws]) -> None:
    draws = runs["best of n"]
    np.testing.assert_allclose(draws.mean(draws.reward), draws.reward.mean(axis=1))


def test_what_has_weight_0_does_not_count_even_where_it_is_infinite() -> None:
    likelihood = bk.Constraint(lambda completions: [text.startswith("1") for text in completions])
    draws = bk.Exact().run(bk.Posterior(TextLM(), likelihood, prompts="0", max_new_tokens=2), seed=0)
    np.testing.assert_array_equal(draws.mean(draws.log_likelihood), [0.0])
    np.testing.assert_allclose(draws.mean(np.ones(draws.shape[1])), [1.0])  # (N,) for one prompt


@pytest.mark.parametrize("shape", [(300,), (2, 299), (1, 300), (300, 2), ()])
def test_the_mean_refuses_values_of_another_shape(runs: dict[str, bk.Draws], shape: tuple) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"\(P, N, ...\) = \(2, 300\)"):
        runs["IS"].mean(np.zeros(shape))


def test_resampling_draws_each_completion_by_its_weight(runs: dict[str, bk.Draws]) -> None:
    exact, num = runs["Exact"], 40_000
    sample = exact.resample(num, seed=0)
    assert sample.shape == (2, num)
    for p in range(2):
        keys = {tuple(x): n for n, x in enumerate(exact.tokens[p].tolist())}
        seen = np.bincount([keys[tuple(x)] for x in sample.tokens[p].tolist()], minlength=exact.shape[1])
        mass = np.exp(exact.log_weights[p] - exact.log_evidence[p]) / exact.shape[1]
        z = (seen - num * mass) / np.sqrt(num * mass * (1 - mass))
        assert np.abs(z).max() < 5
        assert np.square(z).mean() == pytest.approx(1, abs=0.5)


def test_resampled_draws_keep_their_rows_together_and_lose_their_weights(runs: dict[str, bk.Draws]) -> None:
    sample = runs["SMC"].resample(500, seed=1)
    np.testing.assert_array_equal(sample.reward, POSTERIOR.reward(sample))
    np.testing.assert_allclose(sample.log_prior, POSTERIOR.log_prior(sample), atol=1e-12)
    assert (sample.log_weights == 0).all()
    assert np.isnan([sample.log_evidence, sample.ess, sample.pareto_k, sample.log_evidence_se]).all()
    assert not sample.info
    np.testing.assert_array_equal(sample.tokens, runs["SMC"].resample(500, seed=1).tokens)


def test_resampling_never_draws_what_is_impossible() -> None:
    likelihood = bk.Constraint(lambda completions: [not text.startswith("1") for text in completions])
    draws = bk.ImportanceSampling(50).run(bk.Posterior(TextLM(), likelihood, prompts="0", max_new_tokens=2), seed=0)
    assert np.isneginf(draws.log_weights).any()
    assert np.isfinite(draws.resample(2000, seed=0).log_likelihood).all()


@pytest.mark.parametrize("num", [0, -1, 2.5, True, "3", None])
def test_resampling_needs_a_number(runs: dict[str, bk.Draws], num: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="num must be an integer of at least 1"):
        runs["IS"].resample(num, seed=0)


def test_texts_stand_where_their_tokens_stand(runs: dict[str, bk.Draws]) -> None:
    draws = runs["SMC"]
    texts = draws.texts()
    assert [len(row) for row in texts] == [100, 100]
    for p, n in [(0, 0), (0, 99), (1, 0), (1, 57)]:
        ids = draws.tokens[p, n, : draws.lengths[p, n]]
        assert texts[p][n] == "".join(str(i) for i in ids if i != 3)


def test_draws_without_a_tokenizer_have_everything_but_texts() -> None:
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    draws = bk.SMC(8).run(bk.Posterior(RecurrentLM(), longer, prompts=[1], max_new_tokens=3), seed=0)
    with pytest.raises(bk.BayesKLRLError, match=r"no tokenizer\. Use `tokens` and `lengths`"):
        draws.texts()
    assert "text" not in draws.to_pandas()
    draws.mean(draws.reward)


@pytest.mark.parametrize("name", ALL)
def test_a_table_has_one_row_a_draw(runs: dict[str, bk.Draws], name: str) -> None:
    draws = runs[name]
    table = draws.to_pandas()
    num_prompts, num_draws = draws.shape
    assert len(table) == num_prompts * num_draws
    for p, n in [(0, 0), (1, 0), (1, num_draws - 1)]:
        row = table[(table.prompt == draws.prompts[p]) & (table.draw == n)]
        assert row.text.item() == draws.texts()[p][n]
        assert row.length.item() == draws.lengths[p, n]
        assert row.log_weight.item() == draws.log_weights[p, n]
        for column in ("reward", "log_prior", "log_likelihood", "log_proposal", "finished"):
            np.testing.assert_array_equal(row[column].item(), getattr(draws, column)[p, n])
    by_prompt = table.groupby("prompt", sort=False)
    np.testing.assert_allclose(by_prompt.weight.sum(), 1)
    np.testing.assert_allclose(
        by_prompt[["weight", "reward"]].apply(lambda t: t.weight @ t.reward), draws.mean(draws.reward)
    )
    columns = "prompt draw text reward log_prior log_likelihood log_proposal log_weight weight length finished"
    assert list(table) == columns.split()


def test_draws_say_which_completions_were_cut(runs: dict[str, bk.Draws]) -> None:
    for draws in runs.values():
        last = np.take_along_axis(draws.tokens, draws.lengths[..., None] - 1, axis=2)[..., 0]
        np.testing.assert_array_equal(draws.finished, last == 3)
        assert 0 < draws.finished.mean() < 1
        np.testing.assert_array_equal(draws.resample(4, seed=0).finished.shape, (2, 4))


def test_draws_that_are_all_impossible_weigh_nothing(runs: dict[str, bk.Draws]) -> None:
    log_weights = runs["IS"].log_weights.copy()
    log_weights[1] = -np.inf
    table = replace(runs["IS"], log_weights=log_weights).to_pandas()
    np.testing.assert_allclose(table.groupby("prompt", sort=False).weight.sum(), [1, 0])


def test_cost_is_counted_and_repr_is_short(runs: dict[str, bk.Draws]) -> None:
    for draws in runs.values():
        assert draws.seconds > 0
        assert draws.model_tokens > 0
        assert draws.training_tokens == 0
        assert len(repr(draws)) < 200
        assert draws.method in repr(draws)
