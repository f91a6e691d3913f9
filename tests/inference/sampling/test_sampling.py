"""Every sampler's draws against enumeration by chi-square, seeds, and the decode loop against one row a particle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.models import decoding as decoding_module
from bayes_klrl.models.decoding import Decoding
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior, repeated

pytestmark = pytest.mark.usefixtures("large_blocks")

NUM_RUNS = 30
NUM_RUNS_ON_NETWORKS = 15


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(problems.gold_posterior())


def proposal() -> bk.NgramLM:
    return full_table(bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3), 3, noise=0.4, seed=1)


def best_of_n_law(log_prior: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """p_n(x) = p0(x) / p0(level) (F(level)^n - F^-(level)^n), F the prior's cdf over levels of equal reward."""
    p0 = np.exp(log_prior)
    levels, level = np.unique(reward.round(9), return_inverse=True)
    mass = np.bincount(level, weights=p0, minlength=len(levels))
    cdf = mass.cumsum()
    of_level = cdf**n - np.concatenate([[0.0], cdf[:-1]]) ** n
    return p0 / mass[level] * of_level[level]


# 100 draws of each prompt that may be tested as independent ones: few of a large pool, or all of an exact sampler.
SAMPLERS: dict[str, Callable[[bk.Posterior], bk.Draws]] = {
    "SMC": lambda posterior: bk.SMC(5000).run(posterior, seed=0).resample(100, 0),
    "exact": lambda posterior: bk.Exact(num_draws=100).run(posterior, seed=0),
    "prior IS": lambda posterior: bk.ImportanceSampling(5000).run(posterior, seed=0).resample(100, 0),
    "IS from a proposal": lambda posterior: (
        bk.ImportanceSampling(5000, proposal=proposal()).run(posterior, seed=0).resample(100, 0)
    ),
    "SMC, always": lambda posterior: (
        bk.SMC(5000, ess_threshold=1.0, resampling="residual").run(posterior, seed=0).resample(100, 0)
    ),
    "SMC from a proposal": lambda posterior: (
        bk.SMC(5000, proposal=proposal(), twist=0.0, resampling="stratified").run(posterior, seed=0).resample(100, 0)
    ),
    "rejection": lambda posterior: bk.RejectionSampling(100).run(posterior, seed=0),
    "annealed SMC": lambda posterior: bk.AnnealedSMC(3000).run(posterior, seed=0).resample(100, 0),
    "suffix MH": lambda posterior: bk.SuffixMH(100, 1, num_warmup=60).run(posterior, seed=0),
    "suffix MH, cut anywhere": lambda posterior: bk.SuffixMH(
        100, 1, num_warmup=100, cut="max_length", proposal=proposal()
    ).run(posterior, seed=0),
    "quasi-rejection, a bound that holds": lambda posterior: bk.QuasiRejection(100, bound=5.0, proposal=proposal()).run(
        posterior, seed=0
    ),
}


def assert_follows(law: np.ndarray, observed: np.ndarray) -> None:
    """Judge counts (runs, outcomes): p-values uniform over runs, and all runs together."""
    p_values = [chi_square_p(row, law) for row in observed]
    assert stats.kstest(p_values, "uniform").pvalue > 0.005
    assert chi_square_p(observed.sum(axis=0), law) > 0.001


@pytest.mark.slow
@crossed(name=SAMPLERS)
def test_draws_follow_the_posterior(backend: str, name: str, truth: Truth) -> None:
    posterior = on(backend, problems.gold_posterior())
    draws = SAMPLERS[name](repeated(posterior, NUM_RUNS if backend == "ngram" else NUM_RUNS_ON_NETWORKS))
    assert_follows(truth.p[0], np.array([counts(truth, tokens) for tokens in draws.tokens]))


def test_the_chi_square_bites(truth: Truth) -> None:
    """Prior draws, and draws at a slightly wrong alpha, are found out."""
    prior_draws = counts(truth, bk.ImportanceSampling(5000).run(problems.gold_posterior(), seed=0).tokens[0])
    assert chi_square_p(prior_draws, truth.p[0]) < 1e-10
    wrong = bk.Exact(num_draws=5000).run(problems.gold_posterior(alpha=1 / 1.2), seed=0)
    assert chi_square_p(counts(truth, wrong.tokens[0]), truth.p[0]) < 1e-4
    assert chi_square_p(prior_draws, np.exp(truth.log_prior[0])) > 0.001


@pytest.mark.slow
def test_one_draw_of_each_of_many_runs_follows_the_posterior() -> None:
    """Small populations, two different prompts, EOS early: one draw a run, each prompt a run of its own."""
    base = random_posterior(31, num_tokens=4, eos_logit=0.5, prompts=((0,), (1,)), alpha=0.8)
    many = bk.Posterior(base.prior, base.likelihood, prompts=[[0]] * 2500, max_new_tokens=4)
    draws = bk.SMC(256, ess_threshold=0.7).run(many, seed=0).resample(1, seed=1)
    truth = Truth(bk.Posterior(base.prior, base.likelihood, prompts=[[0]], max_new_tokens=4))
    assert chi_square_p(counts(truth, draws.tokens[:, 0]), truth.p[0]) > 0.001


@crossed(n=[7, 1, 2])
def test_best_of_n_follows_its_own_law(backend: str, n: int, truth: Truth) -> None:
    """Rewards of GOLD tie often (many completions, few values), which the law accounts for."""
    law = best_of_n_law(truth.log_prior[0], truth.reward[0], n)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    assert len(np.unique(truth.reward.round(9))) < 100
    draws = bk.BestOfN(n, 150).run(repeated(on(backend, problems.gold_posterior()), NUM_RUNS), seed=0)
    assert_follows(law, np.array([counts(truth, tokens) for tokens in draws.tokens]))


@crossed(num_prompts=[3, 1])
def test_blocks_seam_without_a_trace(backend: str, num_prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws do depend on the block size, being of one stream of uniforms; their law does not, nor their number."""
    posterior = on(backend, random_posterior(32, num_tokens=3, prompts=((0,), (1,), (2,))[:num_prompts]))
    truth = Truth(posterior)
    rows = 7 if backend == "ngram" else 101  # no multiple of 4
    monkeypatch.setattr(decoding_module, "ROWS_PER_BLOCK", rows * num_prompts)
    best = bk.BestOfN(4, 1001).run(posterior, seed=0)
    plain = bk.ImportanceSampling(1001).run(posterior, seed=0)
    assert best.shape == plain.shape == (num_prompts, 1001)
    for p in range(num_prompts):
        law = best_of_n_law(truth.log_prior[p], truth.reward[p], 4)
        assert chi_square_p(counts(truth, best.tokens[p]), law) > 0.001
        assert chi_square_p(counts(truth, plain.tokens[p]), np.exp(truth.log_prior[p])) > 0.001
    np.testing.assert_allclose(best.log_prior, posterior.log_prior(best), rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_array_equal(best.reward, posterior.reward(best))


def test_best_of_n_divergence_is_below_its_bound() -> None:
    """KL(p_n || p0) <= log n - (n - 1) / n and <= -log p0(best level), by the law that the draws follow."""
    for seed in range(3):
        truth = Truth(random_posterior(40 + seed, num_tokens=4))
        log_prior, reward = truth.log_prior[0], truth.reward[0]
        best_level = np.exp(log_prior[reward == reward.max()]).sum()
        for n in (1, 2, 4, 16, 256):
            kl = kl_to_prior(best_of_n_law(log_prior, reward, n), log_prior)
            assert kl <= np.log(n) - (n - 1) / n + 1e-12
            assert kl <= -np.log(best_level) + 1e-12
    # close to the bound where rewards hardly tie and n is small, at odds with it where they tie
    assert best_of_n_kl(random_posterior(40, num_tokens=6, vocab_size=5), 4) > 0.95 * (np.log(4) - 3 / 4)
    binary = bk.TokenReward(lambda tokens, lengths: (tokens[:, 0] == 0) * 1.0, alpha=1.0)
    tied = bk.Posterior(bk.NgramLM(np.log(np.full((3, 3), 1 / 3)), eos_token_id=2), binary, max_new_tokens=3)
    assert best_of_n_kl(tied, 64) == pytest.approx(np.log(3), abs=1e-6)


def best_of_n_kl(posterior: bk.Posterior, n: int) -> float:
    """KL(p_n || p0), enumerated."""
    truth = Truth(posterior)
    law = best_of_n_law(truth.log_prior[0], truth.reward[0], n)
    return kl_to_prior(law, truth.log_prior[0])


def kl_to_prior(law: np.ndarray, log_prior: np.ndarray) -> float:
    """sum law (log law - log p0), 0 log 0 = 0."""
    some = law > 0
    return float((law[some] * (np.log(law[some]) - log_prior[some])).sum())


def test_best_of_n_keeps_the_first_of_ties_and_no_weights() -> None:
    """With a constant reward it is the prior, candidate for candidate."""
    posterior = random_posterior(33, num_tokens=3)
    constant = bk.Posterior(
        posterior.prior,
        bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), -np.inf), alpha=1.0),
        max_new_tokens=3,
    )
    candidates = bk.BestOfN(1, 40).run(constant, seed=3)
    best = bk.BestOfN(4, 10).run(constant, seed=3)
    np.testing.assert_array_equal(best.tokens, candidates.tokens[:, ::4])
    np.testing.assert_array_equal(best.lengths, candidates.lengths[:, ::4])
    np.testing.assert_array_equal(best.log_weights, 0.0)
    assert np.isnan(best.log_proposal).all()
    assert np.isnan(best.log_evidence).all()


# --- weights, seeds ---------------------------------------------------------------------------------------


def tiny_transformer(**options: Any) -> bk.Posterior:
    settings = {"vocab_size": 5, "max_new_tokens": 3, "hidden": 16, "layers": 1, "target_kl": 0.5} | options
    return problems.random_gpt2_task(3, **settings)


@pytest.mark.parametrize("make", [problems.gold_posterior, tiny_transformer])
def test_weights_from_the_prior_are_exactly_the_likelihood(make: Callable[[], bk.Posterior]) -> None:
    posterior = make()
    for options in ({}, {"proposal": posterior.prior}):
        draws = bk.ImportanceSampling(700, **options).run(posterior, seed=0)
        np.testing.assert_array_equal(draws.log_weights, draws.reward / posterior.alpha)
        np.testing.assert_array_equal(draws.log_prior, draws.log_proposal)
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(draws.reward, posterior.reward(draws))


@crossed(num_draws=[50, 4])
def test_importance_sampling_is_unbiased_from_any_proposal(backend: str, num_draws: int) -> None:
    base = on(backend, random_posterior(34, num_tokens=4, prompts=((1,),)))
    many = bk.Posterior(base.prior, base.likelihood, prompts=[[1]] * 400, max_new_tokens=4)
    other = full_table(base.prior, 3, noise=0.8, seed=2)
    draws = bk.ImportanceSampling(num_draws, proposal=other).run(many, seed=1)
    truth = Truth(base)
    ratio = np.exp(draws.log_evidence - truth.log_evidence[0])
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 20
    np.testing.assert_allclose(draws.log_evidence, np.log(np.exp(draws.log_weights).mean(axis=1)), rtol=0, atol=1e-12)
    spread = draws.log_evidence.std()
    if num_draws == 50:
        claimed = np.sqrt((draws.log_evidence_se**2).mean())
        assert 0.75 < claimed / spread < 1.25
    # the ELBO of the proposal: unbiased for log Z - KL(q || p*)
    errors = draws.elbo - (truth.log_evidence - truth.kl(other))[0]
    assert abs(errors.mean()) < 3 * errors.std() / 20


VARIANTS: dict[str, Any] = {
    "SMC, multinomial": bk.SMC(30, ess_threshold=1.0, resampling="multinomial"),
    "SMC, residual": bk.SMC(30, ess_threshold=1.0, resampling="residual"),
    "SMC, stratified": bk.SMC(30, ess_threshold=1.0, resampling="stratified"),
    "IS from SVI": bk.ImportanceSampling(30, proposal=bk.SVI(3, num_particles=8)),
    "SMC from SVI": bk.SMC(30, proposal=bk.SVI(3, num_particles=8, estimator="rao_blackwell")),
}
"""Options beside the rows of `tests.algorithms`, whose seeds `tests.test_algorithms` judges."""


@pytest.mark.parametrize("make", [lambda: random_posterior(1, prompts=((0,), (1, 2))), tiny_transformer])
@pytest.mark.parametrize("name", VARIANTS)
def test_same_seed_same_draws(name: str, make: Callable[[], bk.Posterior]) -> None:
    import torch

    algorithm, posterior = VARIANTS[name], make()
    first = algorithm.run(posterior, seed=3)
    np.random.seed(1)  # noqa: NPY002  (global state must not matter)
    torch.manual_seed(1)
    again, other = algorithm.run(make(), seed=3), algorithm.run(posterior, seed=4)
    for field in ("tokens", "lengths", "log_weights", "log_proposal", "log_evidence", "elbo"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.tokens, other.tokens)


# --- the decode loop, against one row for each particle ---------------------------------------------------------


def naive_decode(
    models: list[bk.LanguageModel],
    prompts: list[list[int]],
    num_draws: int,
    num_tokens: int,
    uniforms: np.ndarray,
    reorders: dict[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every particle has a state row of its own from the start, finished ones too; nothing is shared or dropped."""

    def host(array: Any) -> np.ndarray:
        return np.asarray(array.detach() if hasattr(array, "detach") else array, dtype=np.float64)

    rows = [prompt for prompt in prompts for _ in range(num_draws)]
    num_rows, eos = len(rows), models[0].eos_token_ids
    filler = min(eos, default=0)
    states = [model.prefill(rows) for model in models]
    tokens, lengths = np.full((num_rows, num_tokens), filler), np.zeros(num_rows, dtype=int)
    log_probs, live = np.zeros((len(models), num_rows)), np.ones(num_rows, dtype=bool)
    for t in range(num_tokens):
        table = [host(model.next_log_probs(state)) for model, state in zip(models, states, strict=True)]
        for row in np.flatnonzero(live):
            cumulative = np.exp(table[0][row]).cumsum()
            token = int((cumulative <= uniforms[t, row] * cumulative[-1]).sum())
            tokens[row, t], lengths[row] = token, t + 1
            log_probs[:, row] += [each[row, token] for each in table]
            live[row] = token not in eos
        fed = tokens[:, t]
        if t in reorders:
            ancestors = reorders[t]
            tokens, lengths, live = tokens[ancestors], lengths[ancestors], live[ancestors]
            log_probs, fed = log_probs[:, ancestors], fed[ancestors]
            states = [model.select(state, ancestors) for model, state in zip(models, states, strict=True)]
        if t + 1 < num_tokens:
            states = [model.append(state, fed) for model, state in zip(models, states, strict=True)]
    return tokens, lengths, log_probs


def ngram_pair(seed: int, eos: tuple[int, ...]) -> list[bk.LanguageModel]:
    posterior = random_posterior(seed, order=3, eos=eos, eos_logit=0.3)
    return [full_table(posterior.prior, 4, noise=0.6, seed=seed), posterior.prior]


def gpt2_pair(seed: int, eos: tuple[int, ...]) -> list[bk.LanguageModel]:
    tiny = [
        tiny_transformer(vocab_size=4).prior,
        problems.random_gpt2_task(9, vocab_size=4, max_new_tokens=3, hidden=16, layers=2, target_kl=0.5).prior,
    ]
    return [bk.TorchLM(lm.module, eos_token_id=eos) for lm in tiny]  # type: ignore[attr-defined]


@pytest.mark.parametrize("eos", [(3,), (), (0, 3)], ids=str)
@pytest.mark.parametrize("make, atol", [(ngram_pair, 1e-12), (gpt2_pair, 2e-5)], ids=["ngram", "gpt2"])
@pytest.mark.parametrize("num_models", [1, 2])
def test_sharing_rows_changes_nothing(
    make: Callable[[int, tuple[int, ...]], list[bk.LanguageModel]],
    atol: float,
    eos: tuple[int, ...],
    num_models: int,
) -> None:
    models = make(5, eos)[:num_models]
    prompts, num_draws, num_tokens = [[0], [1, 2, 0, 1], [2, 2]], 40, 7
    rng = np.random.default_rng(6)
    uniforms = rng.random((num_tokens, 120))
    within = rng.integers(0, num_draws, size=(3, 3, num_draws))
    within[1, 0] = 7  # everybody descends from one
    offset = num_draws * np.arange(3)[:, None]
    reorders = {t: (within[i] + offset).ravel() for i, t in enumerate((0, 2, 4))}
    loop = Decoding(models, prompts, num_draws, num_tokens)
    t = 0
    while not loop.done:
        loop.step(uniforms[t])
        if t in reorders:
            loop.reorder(reorders[t])
        t += 1
    tokens, lengths, log_probs = naive_decode(models, prompts, num_draws, num_tokens, uniforms, reorders)
    np.testing.assert_array_equal(loop.tokens, tokens)
    np.testing.assert_array_equal(loop.lengths, lengths)
    np.testing.assert_allclose(loop.log_probs, log_probs, rtol=0, atol=atol)
    for k, model in enumerate(models):
        scored = np.asarray(to_numpy(model.token_log_probs(prompts, loop.sequences()))).sum(axis=2)
        np.testing.assert_allclose(loop.log_probs[k].reshape(3, num_draws), scored, rtol=0, atol=10 * atol)
    naive_cost = num_models * (sum(map(len, prompts)) + 120 * (num_tokens - 1))
    assert loop.model_tokens < 0.9 * naive_cost


def to_numpy(array: Any) -> np.ndarray:
    return np.asarray(array.detach() if hasattr(array, "detach") else array)


def test_one_object_twice_runs_once() -> None:
    lm = random_posterior(5).prior
    once, twice = Decoding([lm], [[0]], 8, 4), Decoding([lm, lm], [[0]], 8, 4)
    rng = np.random.default_rng(0)
    while not once.done:
        uniforms = rng.random(8)
        once.step(uniforms)
        twice.step(uniforms)
    assert once.model_tokens == twice.model_tokens
    np.testing.assert_array_equal(twice.log_probs[0], twice.log_probs[1])
    np.testing.assert_array_equal(once.log_probs[0], twice.log_probs[1])


def test_uniforms_at_the_ends_of_their_range() -> None:
    """0 is the first token that is possible, and the largest float below 1 the last one: never one of probability 0."""
    with np.errstate(divide="ignore"):
        lm = bk.NgramLM(np.log([0.0, 0.3, 0.0, 0.7, 0.0]), eos_token_id=4)
    loop = Decoding([lm], [[]], 2, 2)
    while not loop.done:
        loop.step(np.array([0.0, np.nextafter(1.0, 0.0)]))
    np.testing.assert_array_equal(loop.tokens, [[1, 1], [3, 3]])
