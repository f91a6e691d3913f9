"""The problems with known truth against the numbers of theory.md 8, by plain enumeration with itertools."""

import math
from itertools import product

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.problems.gpt2_tasks import _RandomReward

# alpha = 1 / b: log Z, E[r], Var[r], KL(p* || p0), ESS / N of prior importance sampling (P1, to the digits printed)
GOLD = {
    0.5: (0.39722716, 0.96385693, 0.67360811, 0.08470130, 0.848386),
    1.5: (1.65238447, 1.48690885, 0.33614944, 0.57797880, 0.444887),
    4.0: (5.87342935, 1.78149356, 0.03937661, 1.25254488, 0.219620),
}


def completions(vocab_size: int, eos: int, num_tokens: int) -> list[list[int]]:
    """Every completion once, straight from the definition: nothing follows the first EOS."""
    rows = product(range(vocab_size), repeat=num_tokens)
    return [list(x) for x in sorted({x[: x.index(eos) + 1] if eos in x else x for x in rows})]


def truth(posterior: bk.Posterior, xs: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return p0, p*, r of the completions and log Z."""
    p0, reward = np.exp(posterior.log_prior(xs)[0]), posterior.reward(xs)[0]
    joint = p0 * np.exp(reward / posterior.alpha)
    return p0, joint / joint.sum(), reward, float(np.log(joint.sum()))


@pytest.mark.parametrize("b", GOLD)
def test_gold_numbers(b: float) -> None:
    p0, p, reward, log_evidence = truth(problems.gold_posterior(alpha=1 / b), completions(4, 3, 6))
    mean = p @ reward
    assert len(p0) == 1093
    assert p0.sum() == pytest.approx(1, abs=1e-12)
    assert p0 @ reward == pytest.approx(0.62831994, abs=5e-9)
    kl = p @ np.log(p / p0)
    measured = (log_evidence, mean, p @ (reward - mean) ** 2, kl)
    np.testing.assert_allclose(measured, GOLD[b][:4], rtol=0, atol=6e-9)
    assert 1 / (p0 @ (p / p0) ** 2) == pytest.approx(GOLD[b][4], abs=6e-7)


def test_gold_mode_and_truncated_mass() -> None:
    xs = completions(4, 3, 6)
    p0, p, _, _ = truth(problems.gold_posterior(), xs)
    cut = np.array([x[-1] != 3 for x in xs])
    assert p0[cut].sum() == pytest.approx(0.329323, abs=6e-7)
    assert p[cut].sum() == pytest.approx(0.582598, abs=6e-7)
    assert p0 @ np.log(p0 / p) == pytest.approx(0.70990457, abs=6e-9)
    assert xs[int(p.argmax())] == [1, 0, 1, 2, 3]
    assert p.max() == pytest.approx(0.030193, abs=6e-7)


def test_gold_reward_against_the_definition_in_words() -> None:
    xs = completions(4, 3, 5)
    posterior = problems.gold_posterior(max_new_tokens=5)
    for x, reward in zip(xs, posterior.reward(xs)[0], strict=True):
        text = "".join(map(str, x)).rstrip("3")
        final = 2.0 if "01" in text else 0.3 if text.endswith("0") else 0.0
        assert reward == pytest.approx(-0.2 * text.count("1") + 0.1 * text.count("2") + final, abs=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6])
def test_gold_bounds_hold_and_from_two_tokens_on_are_reached(num_tokens: int) -> None:
    posterior = problems.gold_posterior(max_new_tokens=num_tokens)
    reward = posterior.reward(completions(4, 3, num_tokens))
    assert posterior.likelihood.bounds is not None
    low, high = posterior.likelihood.bounds
    assert low <= reward.min()
    assert reward.max() <= high
    if num_tokens >= 2:
        np.testing.assert_allclose((reward.min(), reward.max()), (low, high), atol=1e-8)


def test_gold_table_is_the_formula() -> None:
    table = problems.gold_table(-0.5)
    logits = [math.sin(1.7 * 2 + 2.3 * a + 0.5 * 2 * a) - 0.5 * (a == 3) for a in range(4)]
    np.testing.assert_allclose(np.exp(table[2]), np.exp(logits) / np.exp(logits).sum(), rtol=1e-13)
    assert problems.gold_table(0.0, num=6).shape == (6, 6)


@pytest.mark.parametrize("name", problems.GPT2_TASKS)
def test_gpt2_tasks_are_a_moderate_way_from_their_prior(name: str) -> None:
    options = problems.GPT2_TASKS[name]
    posterior = problems.gpt2_task(name)
    vocab_size, num_tokens = options["vocab_size"], options["max_new_tokens"]
    p0, p, reward, _ = truth(posterior, completions(vocab_size, vocab_size - 1, num_tokens))

    assert p0.sum() == pytest.approx(1, abs=1e-5)
    assert p @ np.log(p / p0) == pytest.approx(options.get("target_kl", 2.0), abs=1e-4)
    assert 1.5 <= p @ np.log(p / p0) <= 3
    assert p.max() < 0.5
    assert -(p0 @ np.log(p0)) < 0.9 * (num_tokens * math.log(vocab_size))
    assert posterior.likelihood.bounds == pytest.approx((reward.min(), reward.max()), abs=1e-6)
    assert posterior.alpha == options["alpha"]
    assert posterior.prior.eos_token_ids == {vocab_size - 1}
    assert np.unique(posterior.reward([[0] * num_tokens, [1] * num_tokens, [vocab_size - 1]])).size == 3


def test_next_tokens_of_the_random_gpt2_are_far_from_uniform() -> None:
    posterior = problems.gpt2_task("gpt2-8x4")
    prior = posterior.prior
    log_p = prior.next_log_probs(prior.prefill([*posterior.prompt_ids, [0], [3, 3], [6, 1, 4]]))
    log_p = log_p.detach().numpy().astype(np.float64)
    entropy = -(np.exp(log_p) * log_p).sum(axis=1)
    assert entropy.mean() < 0.85 * math.log(8)
    assert np.abs(np.exp(log_p[0]) - np.exp(log_p[1])).max() > 0.05  # the context matters


def test_random_tasks_depend_on_the_seed_alone() -> None:
    import torch

    xs = completions(5, 4, 3)
    state = torch.random.get_rng_state()
    first = problems.random_gpt2_task(3, vocab_size=5, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    again = problems.random_gpt2_task(3, vocab_size=5, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    other = problems.random_gpt2_task(4, vocab_size=5, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    np.testing.assert_array_equal(first.log_joint(xs), again.log_joint(xs))
    assert np.abs(first.log_prior(xs) - other.log_prior(xs)).max() > 0.1
    assert np.ptp(first.reward(xs) / other.reward(xs)) > 0.1  # not the same one, rescaled


def test_the_random_reward_by_hand() -> None:
    reward = _RandomReward(
        np.array([0.1, 0.02, 0.003, 0.0004]), pair=(0, 1), pair_bonus=10.0, length_slope=100.0, scale=2.0
    )
    tokens = np.array([[0, 1, 0, 1], [1, 0, 3, 3], [3, 3, 3, 3], [2, 0, 1, 3], [0, 2, 1, 1]])
    values = reward(tokens, np.array([4, 3, 1, 4, 4]))
    np.testing.assert_allclose(values / 2, [410.24, 300.1204, 100.0004, 410.1234, 400.143], rtol=1e-14)


def test_a_reward_that_leaves_one_completion_is_drawn_again() -> None:
    # The first reward of this seed puts 0.96 of the posterior on a single completion.
    _, p, _, _ = truth(problems.random_gpt2_task(14), completions(8, 7, 4))
    assert p.max() < 0.5


def test_alpha_is_a_unit_of_reward_only() -> None:
    xs = completions(5, 4, 3)
    options = {"vocab_size": 5, "max_new_tokens": 3, "hidden": 16, "layers": 1, "target_kl": 0.5}
    small, large = (problems.random_gpt2_task(3, alpha=alpha, **options) for alpha in (0.1, 0.7))
    np.testing.assert_allclose(small.log_likelihood(xs), large.log_likelihood(xs), rtol=1e-12)
    np.testing.assert_allclose(7 * small.reward(xs), large.reward(xs), rtol=1e-12)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"no task 'gpt3'.*gpt2-7x5"):
        problems.gpt2_task("gpt3")
    with pytest.raises(bk.BayesKLRLError, match="moves this prior by 50"):
        problems.random_gpt2_task(0, vocab_size=4, max_new_tokens=2, hidden=16, layers=1, target_kl=50.0)
