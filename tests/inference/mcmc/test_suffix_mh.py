"""Suffix moves: stationary by their exact transition matrix, the sampler's steps against that matrix, and its chains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.arrays import to_host
from bayes_klrl.export.datatree import draws_to_datatree
from bayes_klrl.export.installed_arviz import installed_arviz
from bayes_klrl.inference.mcmc.diagnostics import ess_bulk, r_hat
from bayes_klrl.inference.mcmc.suffix_moves import CUTS, States, draw_cuts, log_acceptance, suffix_move, tempered
from tests.export.test_datatree import assert_same
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior

az = installed_arviz()


def small() -> bk.Posterior:
    """Completions of 1 to 4 tokens, 40 of them, with rewards that favour some lengths."""
    return random_posterior(51, vocab_size=3, eos=(2,), num_tokens=4, prompts=((0,),), eos_logit=0.5, alpha=0.4)


def other(posterior: bk.Posterior) -> bk.NgramLM:
    return full_table(posterior.prior, 3, noise=0.8, seed=4)


def log_probs_under(lm: bk.LanguageModel, truth: Truth) -> np.ndarray:
    """log q of every completion, of its first token, of its first two, ..., shape (X, T + 1)."""
    per_token = to_host(lm.token_log_probs(truth.posterior.prompt_ids, truth.sequences))[0].astype(np.float64)
    return np.concatenate([np.zeros((len(per_token), 1)), per_token.cumsum(axis=1)], axis=1)


def transition_matrix(truth: Truth, proposal: bk.LanguageModel, cut: str, power: float, accept: Any) -> np.ndarray:
    """P(x -> y) with the kernel's own acceptance: sum over cuts t of pmf(t | x) q(y's tokens after t) min(1, ratio)."""
    xs, width = truth.xs, truth.posterior.max_new_tokens
    log_q, lengths = log_probs_under(proposal, truth), truth.sequences.lengths[0]
    states = States(truth.sequences.tokens[0], lengths, truth.reward[0], np.stack([log_q[:, -1], truth.log_prior[0]]))
    log_w = states.log_weights(truth.posterior, power)
    matrix = np.zeros((len(xs), len(xs)))
    per_token_exact = isinstance(proposal, bk.NgramLM)  # in float64
    for i, x in enumerate(xs):
        accepted = np.exp(accept(np.full(len(xs), log_w[i]), log_w, np.full(len(xs), lengths[i]), lengths, cut))
        for t in range(len(x) if cut == "own_length" else width):
            chance = 1 / len(x) if cut == "own_length" else 1 / width
            if t >= len(x):
                matrix[i, i] += chance
                continue
            same = np.array([y[:t] == x[:t] and len(y) > t for y in xs])
            to = same * np.exp(log_q[:, -1] - log_q[:, t])
            assert to.sum() == pytest.approx(1, abs=1e-12 if per_token_exact else 1e-6)
            matrix[i] += chance * to * accepted
            matrix[i, i] += chance * (to * (1 - accepted)).sum()
    return matrix


@pytest.mark.parametrize("power", [1.0, 0.3])
@pytest.mark.parametrize("use_proposal", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_the_kernel_leaves_its_target_invariant(cut: str, use_proposal: bool, power: float) -> None:
    posterior = small()
    truth = Truth(posterior)
    proposal = other(posterior) if use_proposal else posterior.prior
    matrix = transition_matrix(truth, proposal, cut, power, log_acceptance)
    target = np.exp(truth.log_prior[0] + power * truth.reward[0] / posterior.alpha)
    target /= target.sum()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(target @ matrix, target, rtol=0, atol=1e-12)
    flow = target[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, rtol=0, atol=1e-12)  # reversible
    assert np.sort(np.abs(np.linalg.eigvals(matrix)))[-2] < 1 - 1e-3  # and it reaches everything


def test_without_the_ratio_of_lengths_it_is_not() -> None:
    truth = Truth(small())

    def forgetful(log_w: Any, new_log_w: Any, lengths: Any, new_lengths: Any, cut: str) -> np.ndarray:
        return log_acceptance(log_w, new_log_w, lengths, lengths, cut)

    def upside_down(log_w: Any, new_log_w: Any, lengths: Any, new_lengths: Any, cut: str) -> np.ndarray:
        return log_acceptance(log_w, new_log_w, new_lengths, lengths, cut)

    for wrong in (forgetful, upside_down):
        matrix = transition_matrix(truth, truth.posterior.prior, "own_length", 1.0, wrong)
        assert np.abs(truth.p[0] @ matrix - truth.p[0]).sum() > 0.01


@crossed(cut=CUTS, use_proposal=[True, False])
def test_the_samplers_steps_are_those_of_the_matrix(backend: str, cut: str, use_proposal: bool) -> None:
    """4000 copies of one completion, moved once: a short one, a long one and one that was cut at T."""
    posterior = on(backend, small())
    truth = Truth(posterior)
    proposal = other(posterior) if use_proposal else posterior.prior
    matrix = transition_matrix(truth, proposal, cut, 1.0, log_acceptance)
    log_q = log_probs_under(proposal, truth)[:, -1]
    for x in ([2], [0, 1, 2], [1, 0, 0, 1]):
        i = truth.xs.index(x)
        states = States(
            np.repeat(truth.sequences.tokens[0, [i]], 4000, axis=0),
            np.full(4000, len(x)),
            np.full(4000, truth.reward[0, i]),
            np.tile([[log_q[i]], [truth.log_prior[0, i]]], 4000),
        )
        moved = suffix_move(posterior, (proposal, posterior.prior), states, 1.0, cut, [np.random.default_rng(i)])
        assert chi_square_p(counts(truth, moved.states.tokens), matrix[i]) > 0.001
        # what the new states carry is theirs
        new = bk.Sequences(moved.states.tokens[None], moved.states.lengths[None])
        np.testing.assert_allclose(
            moved.states.log_probs[1], posterior.log_prior(new)[0], rtol=0, atol=precision(backend, 1e-12)
        )
        np.testing.assert_array_equal(moved.states.reward, posterior.reward(new)[0])
        q = bk.Posterior(proposal, posterior.likelihood, prompts=[[0]], max_new_tokens=4)
        np.testing.assert_allclose(
            moved.states.log_probs[0], q.log_prior(new)[0], rtol=0, atol=precision(backend, 1e-12)
        )
        assert (moved.accepted <= moved.proposed).all()


def test_cuts_are_uniform_below_their_limit() -> None:
    lengths, rng = np.repeat([1, 2, 5], 3000), np.random.default_rng(0)
    own, full = (draw_cuts(lengths, 5, cut, rng.random(lengths.size)) for cut in ("own_length", "max_length"))
    for length in (1, 2, 5):
        assert set(own[lengths == length]) == set(range(length))
    assert chi_square_p(np.bincount(own[lengths == 5]), np.full(5, 0.2)) > 0.001
    assert chi_square_p(np.bincount(full), np.full(5, 0.2)) > 0.001


def test_an_impossible_completion_is_no_place_to_stay_or_to_go() -> None:
    one = np.ones(3, dtype=np.int64)
    log_w, new = np.array([-np.inf, 0.0, -np.inf]), np.array([0.0, -np.inf, -np.inf])
    np.testing.assert_array_equal(log_acceptance(log_w, new, one, one, "own_length"), [0.0, -np.inf, 0.0])
    np.testing.assert_array_equal(tempered(np.array([-np.inf, -2.0]), 0.0), [-np.inf, 0.0])


# --- chains --------------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "own length": {},
    "max length": {"cut": "max_length", "num_warmup": 80},
    "proposal, thinned": {"proposal": None, "num_warmup": 300, "thinning": 2},  # this proposal mixes slowly
}


@crossed(name=OPTIONS)
def test_long_chains_follow_the_posterior(backend: str, name: str) -> None:
    """One late draw of each of many chains, of two prompts, with early ends."""
    base = on(
        backend, random_posterior(31, num_tokens=4, eos_logit=0.7, prompts=((0,), (1,)), prompt_shift=0.7, alpha=0.8)
    )
    truth = Truth(base)
    options = {"num_warmup": 40} | OPTIONS[name]
    if "proposal" in options:
        options["proposal"] = other(base)
    draws = bk.SuffixMH(2500, 1, **options).run(base, seed=1)
    assert draws.shape == (2, 2500)
    for p in range(2):
        assert chi_square_p(counts(truth, draws.tokens[p]), truth.p[p]) > 0.001
    np.testing.assert_allclose(draws.log_prior, base.log_prior(draws), rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_array_equal(draws.reward, base.reward(draws))


def test_a_transformers_chains_carry_its_log_probs() -> None:
    """Kept tokens pass through the decode loop again, beside drawn ones: as if scored at once."""
    posterior = problems.random_gpt2_task(3, vocab_size=5, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    draws = bk.SuffixMH(1500, 1, num_warmup=25).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(draws.reward, posterior.reward(draws))
    truth = Truth(posterior)
    assert chi_square_p(counts(truth, draws.tokens[0]), truth.p[0]) > 0.001


def test_chains_start_and_stay_where_it_is_possible(backend: str) -> None:
    def holds(completion_ids: list[list[int]]) -> list[bool]:
        return [ids[0] == 0 and len(ids) > 1 for ids in completion_ids]

    base = on(backend, random_posterior(33, num_tokens=4))
    posterior = bk.Posterior(base.prior, base.likelihood * bk.Constraint(holds), prompts=[[]], max_new_tokens=4)
    draws = bk.SuffixMH(2000, 1, num_warmup=30).run(posterior, seed=0)
    assert np.isfinite(draws.reward).all()
    truth = Truth(posterior)
    assert chi_square_p(counts(truth, draws.tokens[0]), truth.p[0]) > 0.001


def test_chains_that_have_nowhere_to_start_are_an_error() -> None:
    never = bk.Constraint(lambda completion_ids: [False] * len(completion_ids))
    posterior = bk.Posterior(random_posterior(1).prior, never, prompts=[[0], [1]], max_new_tokens=3)
    with pytest.raises(bk.BudgetError, match=r"None of 10000 prior draws of prompt 0 .* nowhere to start"):
        bk.SuffixMH(2, 5).run(posterior, seed=0)


def test_few_starts_are_shared() -> None:
    """One completion in 3^6 is possible, so fewer than 40 of 10,000 are: every chain starts there."""
    prior = bk.NgramLM(np.log(np.full((3, 3), 1 / 3)), eos_token_id=None)
    likelihood = bk.TokenReward(lambda tokens, lengths: np.where((tokens == 1).all(axis=1), 0.0, -np.inf), alpha=1.0)
    posterior = bk.Posterior(prior, likelihood, prompts=[[]], max_new_tokens=6)
    draws = bk.SuffixMH(40, 4, num_warmup=2).run(posterior, seed=0)
    assert (draws.tokens == 1).all()
    assert np.isnan(draws.info["r_hat_reward"]).all()
    assert np.isnan(draws.ess).all()


# --- what is recorded -------------------------------------------------------------------------------------------


def two_prompts() -> bk.Posterior:
    return random_posterior(36, num_tokens=5, prompts=((0,), (1, 2)), prompt_shift=0.5)


@pytest.mark.slow
def test_draws_are_ordered_chain_by_chain(tmp_path: Path) -> None:
    posterior = two_prompts()
    draws = bk.SuffixMH(3, 50, num_warmup=10).run(posterior, seed=0)
    np.testing.assert_array_equal(draws.info["chain"], np.repeat([0, 1, 2], 50))
    assert (np.isnan(draws.log_proposal)).all()
    assert (draws.log_weights == 0).all()
    assert np.isnan(draws.log_evidence).all()
    # neighbours within a chain share a prefix or are the same; the sampler moves one chain at a time that way
    tokens = draws.tokens.reshape(2, 3, 50, 5)
    same = (tokens[:, :, 1:] == tokens[:, :, :-1]).all(axis=3)
    assert same.mean() > 0.1
    tree = draws_to_datatree(draws)
    assert dict(tree["posterior"].sizes) == {"chain": 3, "draw": 50, "prompt": 2}
    np.testing.assert_array_equal(tree["posterior/reward"].values[1, :, 0], draws.reward[0, 50:100])
    np.testing.assert_array_equal(tree["log_prior/x"].values[2, :, 1], draws.log_prior[1, 100:])
    loaded = bk.Draws.load(draws.save(tmp_path / "chains.nc"))
    assert_same(draws, loaded)
    assert dict(draws_to_datatree(loaded)["posterior"].sizes) == {"chain": 3, "draw": 50, "prompt": 2}
    assert dict(draws_to_datatree(draws.resample(30, seed=0))["posterior"].sizes)["chain"] == 1


def test_what_arviz_says_of_the_export_is_in_info() -> None:
    draws = bk.SuffixMH(4, 100).run(two_prompts(), seed=2)
    summary = az.summary(draws.to_arviz(), var_names=["reward", "length"], round_to="none")
    for p, words in enumerate(draws.prompt_words()):
        for name in ("reward", "length"):
            row = summary.loc[f"{name}[{words}]"]
            assert draws.info[f"r_hat_{name}"][p] == pytest.approx(float(row["r_hat"]), abs=1e-6)
            assert draws.info[f"ess_bulk_{name}"][p] == pytest.approx(float(row["ess_bulk"]), rel=1e-6)
    smallest = np.min([draws.info[f"ess_bulk_{name}"] for name in ("reward", "log_prior", "length")], axis=0)
    np.testing.assert_array_equal(draws.ess, smallest)


@pytest.mark.slow
def test_r_hat_sees_chains_that_disagree() -> None:
    """Two modes that suffix moves cannot join, for the first token decides and is hardly ever accepted to change."""
    prior = bk.NgramLM(np.log(np.full((2, 2), 0.5)), eos_token_id=None)
    likelihood = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens[:, 1:] == tokens[:, :1]).all(axis=1), 12.0 + tokens[:, 0], 0.0),
        alpha=1.0,
    )
    posterior = bk.Posterior(prior, likelihood, prompts=[[]], max_new_tokens=12)
    split = bk.SuffixMH(20, 50, num_warmup=300).run(posterior, seed=0)
    joined = bk.SuffixMH(4, 1000).run(random_posterior(36, num_tokens=3, alpha=2.0), seed=0)
    assert (split.info["r_hat_reward"] > 1.5).all()
    assert (joined.info["r_hat_reward"] < 1.02).all()


def test_diagnostics_are_nan_only_where_undefined() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 200))
    values[1] = 7.0  # a constant
    values[2] = np.arange(4)[:, None]  # chains that stand still, each elsewhere
    assert r_hat(values)[0] == pytest.approx(1.0, abs=0.02)
    assert ess_bulk(values)[0] == pytest.approx(800, rel=0.2)
    assert np.isnan(r_hat(values)[1])
    assert np.isnan(ess_bulk(values)[1])
    assert not r_hat(values)[2] < 10
    assert np.isnan(r_hat(values[:, :1])).all()
    assert np.isfinite(ess_bulk(values[:1, :1])).all()
    assert np.isnan(ess_bulk(values[:, :, :3])).all()


def test_acceptance_counts_moves_that_had_something_to_redraw() -> None:
    """A flat reward accepts everything under the fixed grid of cuts, completions of one token included."""
    base = random_posterior(12, vocab_size=3, eos=(2,), num_tokens=6, eos_logit=1.5)
    flat = bk.Posterior(
        base.prior, bk.TokenReward(lambda tokens, lengths: np.zeros(len(tokens)), alpha=1.0), max_new_tokens=6
    )
    for options in ({"cut": "max_length"}, {"cut": "max_length", "proposal": base.prior}):
        assert bk.SuffixMH(10, 20, **options).run(flat, seed=0).info["acceptance_rate"] == [1.0]
    assert (bk.SuffixMH(10, 20).run(flat, seed=0).info["acceptance_rate"] < 1).all()  # the ratio of lengths


def test_options_that_cannot_be() -> None:
    for options, says in (
        ({"cut": "anywhere"}, "Unknown rule for cuts 'anywhere'"),
        ({"num_warmup": -1}, "num_warmup must be an integer of at least 0"),
        ({"thinning": 0}, "thinning must be an integer"),
    ):
        with pytest.raises(bk.BayesKLRLError, match=says):
            bk.SuffixMH(2, 5, **options)  # type: ignore[arg-type]
