"""Backward messages against enumeration, and the gold numbers of theory.md 8 that only they can reach."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl.inference.exact.backward_pass import BackwardPass, StoredMessages
from bayes_klrl.inference.exact.messages import backward_messages, chain_of
from bayes_klrl.models.automata.reward import automaton_potential
from bayes_klrl.models.ngram_lm.tables import BackoffLevel, BackoffTable
from bayes_klrl.randomness import Streams
from tests.helpers.automata import random_hmm, random_likelihood, random_table, solvable_posterior
from tests.helpers.truth import Truth, chi_square_p, counts

TINY = {"rtol": 0, "atol": 1e-10}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("dense 1", {}),
    ("dense 2", {}),
    ("dense 3", {}),
    ("dense 2", {"eos": ()}),
    ("dense 2", {"eos": (0, 2)}),
    ("dense 3", {"prompts": ((0,), (2, 1), (1, 1, 2))}),
    ("dense 2", {"num_tokens": 1}),
    ("dense 2", {"hard": True, "prompts": ((2,), (1,))}),
    ("holes 2", {"hard": True}),
    ("holes 3", {"prompts": ((0,), (1, 2))}),
    ("sparse 1", {}),
    ("sparse 2", {"eos": (0, 2)}),
    ("sparse 3", {"prompts": ((), (2, 1), (1, 1, 2))}),
    ("sparse 4", {"eos": ()}),
    ("sparse 4", {"hard": True, "vocab_size": 3, "eos": (2,), "num_tokens": 6}),
    ("hmm 1", {}),
    ("hmm 3", {"eos": (0, 2), "prompts": ((), (1,), (1, 1, 2))}),
    ("hmm 4", {"eos": (), "hard": True}),
    ("hmm 3", {"num_tokens": 1}),
]


@pytest.fixture(
    scope="module", params=[(c, s) for c in CASES for s in range(3)], ids=lambda p: f"{p[0][0]} {p[0][1]} {p[1]}"
)
def solved(request: pytest.FixtureRequest) -> tuple[bk.Posterior, Truth, Any]:
    (kind, options), seed = request.param
    for attempt in range(20):  # hard limits may leave no posterior at all
        posterior = solvable_posterior(kind, 100 * attempt + seed, **options)
        try:
            messages = backward_messages(posterior)
            return posterior, Truth(posterior), messages
        except bk.SupportError:
            continue
    raise AssertionError("no posterior in twenty attempts")


def test_evidence_and_log_posterior(solved: Any) -> None:
    _, truth, messages = solved
    np.testing.assert_allclose(messages.log_evidence, truth.log_evidence, **TINY)
    possible = np.isfinite(truth.log_posterior)
    log_posterior = messages.log_posterior(truth.sequences)
    np.testing.assert_array_equal(np.isfinite(log_posterior), possible)
    np.testing.assert_allclose(log_posterior[possible], truth.log_posterior[possible], **TINY)


def test_policy_is_the_posterior(solved: Any) -> None:
    """Every conditional p*(a | prefix) and every whole completion, from the decoder's side and the scorer's."""
    posterior, truth, messages = solved
    policy = messages.policy()
    scored = policy.token_log_probs(posterior.prompt_ids, truth.sequences).sum(axis=2)
    possible = truth.log_posterior > -np.inf
    np.testing.assert_allclose(scored[possible], truth.log_posterior[possible], **TINY)
    assert (scored[~possible] == -np.inf).all()
    for p, prompt in enumerate(posterior.prompt_ids):
        p_star = np.exp(truth.log_posterior[p])
        for prefix in {tuple(x[:2]) for x in truth.xs if len(x) > 2}:
            follows = np.array([tuple(x[: len(prefix)]) == prefix for x in truth.xs])
            if p_star[follows].sum() < 1e-12:
                continue
            state = policy.prefill([prompt])
            for token in prefix:
                state = policy.append(state, np.array([token]))
            by_token = [
                p_star[follows & np.array([len(x) > len(prefix) and x[len(prefix)] == a for x in truth.xs])].sum()
                for a in range(policy.vocab_size)
            ]
            probs = np.exp(policy.next_log_probs(state)[0])
            np.testing.assert_allclose(probs, np.array(by_token) / p_star[follows].sum(), rtol=0, atol=1e-9)
            assert probs.sum() == pytest.approx(1.0, abs=1e-12)


def test_optimal_twist(solved: Any) -> None:
    """log psi*_t = log E_p0[likelihood | prefix], at every length, straight from the definition."""
    posterior, truth, messages = solved
    twist = messages.twist()
    likelihood = np.exp(posterior.likelihood.log_likelihood(truth.reward))
    for p in range(posterior.num_prompts):
        p0 = np.exp(truth.log_prior[p])
        for t in range(posterior.max_new_tokens):
            prefixes = sorted({tuple(x[:t]) for x in truth.xs if len(x) > t})
            follows = np.array([[tuple(x[:t]) == prefix for x in truth.xs] for prefix in prefixes])
            mass = follows @ p0
            with np.errstate(divide="ignore", invalid="ignore"):
                expected = np.log(follows @ (p0 * likelihood[p])) - np.log(mass)
            measured = twist(
                posterior, np.full(len(prefixes), p), np.array(prefixes, dtype=np.int64).reshape(len(prefixes), t)
            )
            reached = mass > 0
            np.testing.assert_allclose(np.exp(measured[reached]), np.exp(expected[reached]), rtol=1e-9, atol=1e-300)


def test_moments(solved: Any) -> None:
    posterior, truth, messages = solved
    moments = messages.moments()
    p0, p_star = np.exp(truth.log_prior), np.exp(truth.log_posterior)
    possible = p_star > 0
    reward = np.where(possible, truth.reward, 0.0)
    mean = (p_star * reward).sum(axis=1)
    np.testing.assert_allclose(moments.reward, mean, **TINY)
    np.testing.assert_allclose(moments.variance, (p_star * (reward - mean[:, None]) ** 2).sum(axis=1), **TINY)
    log_ratio = posterior.likelihood.log_likelihood(reward) - truth.log_evidence[:, None]
    np.testing.assert_allclose(moments.kl, (p_star * log_ratio).sum(axis=1), **TINY)
    log_p = np.where(possible, truth.log_posterior, 0.0)
    if isinstance(posterior.prior, bk.HmmLM):
        assert np.isnan(moments.entropy).all()
    else:
        np.testing.assert_allclose(moments.entropy, -(p_star * log_p).sum(axis=1), **TINY)
    with np.errstate(invalid="ignore"):
        prior_reward = np.where(p0 > 0, p0 * truth.reward, 0.0).sum(axis=1)
        backward_kl = np.where(p0 > 0, p0 * (truth.log_prior - truth.log_posterior), 0.0).sum(axis=1)
    np.testing.assert_allclose(moments.prior_reward, prior_reward, **TINY)
    np.testing.assert_allclose(moments.kl_from_prior, backward_kl, **TINY)
    weights = np.exp(posterior.likelihood.log_likelihood(truth.reward) - truth.log_evidence[:, None])
    np.testing.assert_allclose(moments.log_ess_ratio, -np.log((p0 * weights**2).sum(axis=1)), **TINY)


def test_marginals(solved: Any) -> None:
    posterior, truth, messages = solved
    marginals = messages.marginals()
    p_star = np.exp(truth.log_posterior)
    lengths, tokens = truth.sequences.lengths, truth.sequences.tokens
    width, eos = posterior.max_new_tokens, posterior.prior.eos_token_ids
    for p in range(posterior.num_prompts):
        law = np.bincount(lengths[p] - 1, weights=p_star[p], minlength=width)
        np.testing.assert_allclose(marginals.length_law[p], law, **TINY)
        cut = ~truth.sequences.finished(eos)[p]
        np.testing.assert_allclose(marginals.truncated[p], p_star[p, cut].sum(), **TINY)
        states = _path(messages.potential.transitions, tokens[p], lengths[p])
        for t in range(width):
            inside = t < lengths[p]
            law = np.bincount(tokens[p, inside, t], weights=p_star[p, inside], minlength=posterior.prior.vocab_size)
            np.testing.assert_allclose(marginals.tokens[p, t], law, **TINY)
        for t in range(width + 1):
            law = np.bincount(states[:, t], weights=p_star[p], minlength=messages.potential.final.size)
            np.testing.assert_allclose(marginals.automaton_states[p, t], law, **TINY)
    assert messages.marginals() is marginals


def _path(transitions: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    states = np.zeros((len(tokens), tokens.shape[1] + 1), dtype=np.int64)
    for row, (x, length) in enumerate(zip(tokens, lengths, strict=True)):
        for t in range(tokens.shape[1]):
            states[row, t + 1] = transitions[states[row, t], x[t]] if t < length else states[row, t]
    return states


def test_draws_have_the_support_and_shape_they_should(solved: Any) -> None:
    posterior, _, messages = solved
    draws = messages.draw(200, 0)
    assert draws.lengths.shape == (posterior.num_prompts, 200)
    assert np.isfinite(messages.log_posterior(draws)).all()  # also that each is an outcome
    again = messages.draw(300, Streams.of(0))
    np.testing.assert_array_equal(draws.tokens, again.tokens[:, :200])


@pytest.mark.parametrize("kind", ["dense 2", "dense 3", "sparse 3", "hmm 3"])
def test_draws_by_chi_square_over_fifty_seeds(kind: str) -> None:
    posterior = solvable_posterior(kind, 5, num_tokens=4, prompts=((0,), (2, 1)))
    truth, messages = Truth(posterior), backward_messages(posterior)
    p_values = [
        chi_square_p(counts(truth, messages.draw(600, seed).tokens[p]), np.exp(truth.log_posterior[p]))
        for seed in range(50, 100)
        for p in range(2)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    tempered = posterior.likelihood**0.5  # and it bites: draws of another posterior fail
    wrong = backward_messages(bk.Posterior(posterior.prior, tempered, prompts=[[0], [2, 1]], max_new_tokens=4)).draw(
        20_000, 0
    )
    assert chi_square_p(counts(truth, wrong.tokens[0]), np.exp(truth.log_posterior[0])) < 1e-6


@pytest.mark.parametrize("kind", ["dense 2", "dense 3", "sparse 3", "hmm 3"])
@pytest.mark.parametrize("hard", [False, True])
def test_policy_and_twist_leave_no_variance(kind: str, hard: bool) -> None:
    """One particle knows the evidence: forgetting psi_0, an EOS term or t would show here."""
    posterior = solvable_posterior(kind, 4, num_tokens=12, prompts=((0,), (2, 1)), hard=hard)
    messages = backward_messages(posterior)
    policy, twist = messages.policy(), messages.twist()
    smc = bk.SMC(1, proposal=policy, twist=twist).run(posterior, seed=0)
    np.testing.assert_allclose(smc.log_evidence, messages.log_evidence, **TINY)
    for draws in (
        bk.ImportanceSampling(50, proposal=policy).run(posterior, seed=1),
        bk.SMC(50, proposal=policy, twist=twist, ess_threshold=1.0).run(posterior, seed=1),
    ):
        np.testing.assert_allclose(draws.log_weights, np.tile(messages.log_evidence[:, None], 50), **TINY)
        np.testing.assert_allclose(draws.log_proposal, messages.log_posterior(draws), **TINY)


def test_the_policy_of_another_posterior_is_no_cover() -> None:
    posterior, other = (solvable_posterior("dense 2", seed, hard=True) for seed in (0, 0))
    policy = backward_messages(other).policy()
    with pytest.raises(bk.SupportError, match="probability 0"):
        bk.ImportanceSampling(5, proposal=policy).run(posterior, seed=0)


def test_twist_is_consistent_under_the_prior() -> None:
    """psi*_t = sum_a p0(a) psi*_{t+1}, far beyond what can be enumerated."""
    posterior = solvable_posterior("sparse 3", 3, num_tokens=300)
    messages = backward_messages(posterior)
    twist, prior = messages.twist(), posterior.prior
    assert messages.log_evidence == pytest.approx(twist(posterior, np.array([0]), np.zeros((1, 0), dtype=np.int64)))
    for length in (1, 7, 298):
        prefix = np.random.default_rng(length).integers(0, 3, size=length)  # 3 is EOS
        state = prior.prefill([prefix.tolist()])
        longer = np.concatenate([np.tile(prefix, (3, 1)), np.arange(3)[:, None]], axis=1)
        log_psi = twist(posterior, np.zeros(3, dtype=np.int64), longer)
        x = bk.Sequences.from_lists([[*prefix.tolist(), 3]], max_new_tokens=300, pad_token=3)
        ended = posterior.log_likelihood(x)[0]
        total = np.logaddexp.reduce(prior.next_log_probs(state)[0] + np.concatenate([log_psi, ended]))
        assert total == pytest.approx(float(twist(posterior, np.array([0]), prefix[None])[0]), abs=1e-10)


@pytest.mark.parametrize("kind", ["dense 2", "sparse 3", "hmm 3"])
def test_checkpoints_change_nothing(kind: str) -> None:
    posterior = solvable_posterior(kind, 1, num_tokens=37)
    chain, potential = chain_of(posterior.prior), automaton_potential(posterior.likelihood)
    assert chain is not None
    assert potential is not None
    backward = BackwardPass(chain, potential, posterior.prior.eos_token_ids)
    all_of_them, some = StoredMessages(backward, 37), StoredMessages(backward, 37, bytes_in_memory=0)
    assert len(some._kept) < 10 < len(all_of_them._kept)
    for t in [*range(38), *range(37, -1, -1), 20, 3, 36]:
        np.testing.assert_array_equal(some.at(t), all_of_them.at(t))


def test_what_underflows_is_summed_in_logs() -> None:
    """Rewards of thousands of nats, a prior with an EOS of e^-1000: still to the last digit."""
    no, half = -np.inf, np.log(0.5)
    table = np.array([[0.0, no, no, -1000.0], [no, 0.0, no, no], [half, half, no, no], [half, half, no, no]])
    automaton = bk.Automaton([[0] * 4])
    reward = bk.AutomatonReward(automaton, token_rewards=[-1500.0, 3.0, 0.0, 0.0], alpha=1.0)
    posterior = bk.Posterior(bk.NgramLM(table, eos_token_id=3), reward, prompts=[[0], [1], [2]], max_new_tokens=4)
    messages = backward_messages(posterior)
    np.testing.assert_allclose(messages.log_evidence, bk.Exact().run(posterior, seed=0).log_evidence, rtol=1e-13)
    assert messages.log_evidence[0] == pytest.approx(-1000.0)  # ends at once rather than pay four times
    assert messages.draw(5, 0).lengths[0].tolist() == [1] * 5
    ends = bk.AutomatonConstraint(bk.Automaton([[0, 0, 0, 1], [1] * 4], accepting=[1]))
    hard = bk.Posterior(posterior.prior, ends, prompts=[[0]], max_new_tokens=4)
    solved = backward_messages(hard)
    np.testing.assert_allclose(solved.log_evidence, bk.Exact().run(hard, seed=0).log_evidence, rtol=1e-13)
    assert solved.marginals().length_law == pytest.approx(np.full((1, 4), 0.25))
    assert solved.moments().kl == pytest.approx(-solved.log_evidence)


def test_a_sure_filter_whose_states_are_worth_little() -> None:
    """The hidden state that is worth e^900 times as much is the one that the prompt has ruled out."""
    emissions = [[0.5, 0.25, 0.0, 0.25], [0.5, 0.0, 0.5, 0.0]]
    prior = bk.HmmLM([0.5, 0.5], np.eye(2), emissions, eos_token_id=None)
    second = bk.Automaton([[1] * 4, [1] * 4])
    reward = bk.AutomatonReward(second, token_rewards=[[0.0] * 4, [-900.0, -901.0, 0.0, -902.0]], alpha=1.0)
    posterior = bk.Posterior(prior, reward, prompts=[[3], []], max_new_tokens=2)
    exact, messages = bk.Exact().run(posterior, seed=0), backward_messages(posterior)
    np.testing.assert_allclose(messages.log_evidence, exact.log_evidence, rtol=1e-13)
    policy = messages.policy()
    log_probs = policy.next_log_probs(policy.prefill([[3]]))
    np.testing.assert_allclose(np.exp(log_probs), [[0.5, 0.25, 0.0, 0.25]], rtol=0, atol=1e-12)
    assert messages.marginals().tokens[0].sum() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_back_off_that_cancels_is_summed_term_by_term(seed: int) -> None:
    """Long contexts that leave next to nothing to shorter ones, under rewards that ask for just that."""
    rng = np.random.default_rng(seed)
    texts = [[*rng.integers(0, 3, size=6).tolist(), 3] for _ in range(6)]
    prior = bk.NgramLM.fit(texts, order=3, vocab_size=4, eos_token_id=3)
    table = prior.table
    assert isinstance(table, BackoffTable)
    level, log_w = table.levels[1], -35.0
    context = level.arc_keys // 4
    mass = np.bincount(context, weights=np.exp(level.arc_log_probs))
    sharp = BackoffLevel(
        level.context_keys,
        np.full(len(level.context_keys), log_w),
        level.arc_keys,
        level.arc_log_probs - np.log(mass)[context],
    )
    prior = bk.NgramLM(BackoffTable(table.unigram, (table.levels[0], sharp)), eos_token_id=3)
    likelihood = random_likelihood(rng, 4, alpha=0.02)
    for num_tokens in (3, 6):
        posterior = bk.Posterior(prior, likelihood, prompts=[[0], [1, 2], [2]], max_new_tokens=num_tokens)
        exact, messages = bk.Exact().run(posterior, seed=0), backward_messages(posterior)
        np.testing.assert_allclose(messages.log_evidence, exact.log_evidence, **TINY)
        mean = (np.exp(exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]) * exact.reward).sum(axis=1)
        np.testing.assert_allclose(messages.moments().reward, mean, rtol=0, atol=1e-9)


def test_a_likelihood_that_is_no_automaton_is_refused() -> None:
    posterior = solvable_posterior("dense 2", 0)
    plain = posterior.likelihood * bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"not made of bk\.AutomatonReward"):
        backward_messages(bk.Posterior(posterior.prior, plain, max_new_tokens=4))


def test_no_posterior_is_refused() -> None:
    never = bk.AutomatonReward(bk.Automaton([[0, 0]]), final_rewards=[-np.inf], alpha=1.0)
    with pytest.raises(bk.SupportError, match="Every completion of prompt 0"):
        backward_messages(bk.Posterior(bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), never, max_new_tokens=4))


def test_powers_and_products_of_different_alpha() -> None:
    rng = np.random.default_rng(0)
    first, second = (
        bk.AutomatonReward(bk.Automaton(rng.integers(0, 3, (3, 4))), final_rewards=rng.standard_normal(3), alpha=alpha)
        for alpha in (0.3, 2.0)
    )
    never_2 = bk.AutomatonConstraint(bk.Automaton.forbids([2], vocab_size=4))
    prior = bk.NgramLM(random_table(rng, 4, 2), eos_token_id=3)
    for likelihood in (first * second, (first * second * never_2) ** 1.7, never_2, first**0.5 * first):
        posterior = bk.Posterior(prior, likelihood, max_new_tokens=5)
        truth, messages = Truth(posterior), backward_messages(posterior)
        np.testing.assert_allclose(messages.log_evidence, truth.log_evidence, **TINY)
        reward = np.where(np.isfinite(truth.reward), truth.reward, 0.0)
        mean = (np.exp(truth.log_posterior) * reward).sum(axis=1)
        np.testing.assert_allclose(messages.moments().reward, mean, **TINY)


@pytest.mark.slow
def test_an_ngram_twist_serves_another_prior() -> None:
    """theory.md 3.9: messages of a cheap prior as an approximate twist of an expensive one; the evidence stays right."""
    rng = np.random.default_rng(2)
    posterior = solvable_posterior("dense 2", 7, num_tokens=5)
    expensive = bk.Posterior(random_hmm(rng, 3, 4, [3]), posterior.likelihood, max_new_tokens=5)
    twist = backward_messages(posterior).twist()
    log_z = backward_messages(expensive).log_evidence[0]
    runs = np.array([bk.SMC(20, twist=twist).run(expensive, seed=s).log_evidence[0] for s in range(200)])
    weights = np.exp(runs - log_z)
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(200)
    with pytest.raises(bk.BayesKLRLError, match="completions of 5 tokens"):
        twist(
            bk.Posterior(expensive.prior, posterior.likelihood, max_new_tokens=6), np.array([0]), np.zeros((1, 0), int)
        )
