"""Rewards on JAX arrays: traced ones, those on the host, products of both, and what happens when they fail."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models.programs.traced_rewards import check_traceable, host_errors, traced_reward
from tests.helpers.truth import completions

PRIOR = bk.NgramLM.fit(["abab", "bba", "ab", "ba", "aab", "b"], order=2)
EOS = min(PRIOR.eos_token_ids)
A, B = (ids[-1] for ids in (PRIOR.encode(["a"])[0], PRIOR.encode(["b"])[0]))


def in_numpy(tokens: Any, lengths: Any) -> Any:
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens == B, 0).sum(axis=1)


def in_jax(tokens: Any, lengths: Any, prompt_index: Any) -> Any:
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens == B, 0).sum(axis=1) + 0.25 * prompt_index


def in_both(tokens: Any, lengths: Any) -> Any:
    return (tokens == A).sum(axis=1) - 0.5 * lengths


LIKELIHOODS = {
    "traced": bk.TokenReward(in_both, alpha=0.5),
    "traced, jax.numpy": bk.TokenReward(in_jax, alpha=0.5),
    "callback": bk.TokenReward(in_numpy, alpha=0.5, callback=True),
    "text": bk.Reward(lambda texts: [t.count("ab") - 0.1 * len(t) for t in texts], alpha=2.0),
    "constraint": bk.Constraint(lambda texts: ["bb" not in t for t in texts]),
    "traced x text, one alpha": bk.TokenReward(in_both, alpha=2.0)
    * bk.Reward(
        lambda completions, prompts: [len(c + p) for c, p in zip(completions, prompts, strict=True)], alpha=2.0
    ),
    "traced x callback x text x constraint": bk.TokenReward(in_jax, alpha=0.5) ** 2
    * bk.TokenReward(in_numpy, alpha=3.0, callback=True)
    * bk.Reward(lambda texts: [len(t) for t in texts], alpha=2.0)
    * bk.Constraint(lambda texts: ["bb" not in t for t in texts]),
    "automaton": bk.AutomatonReward(
        bk.Automaton.counts(A, modulo=2, vocab_size=PRIOR.vocab_size), final_rewards=[1.0, 0.0], alpha=0.5
    ),
}


def posterior_of(likelihood: bk.Likelihood, prompts: Any = ("a", "ba", "")) -> bk.Posterior:
    return bk.Posterior(PRIOR, likelihood, prompts=list(prompts), max_new_tokens=3)


def all_rows(posterior: bk.Posterior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every completion after every prompt."""
    listed = completions(PRIOR.vocab_size, [EOS], 3)
    one = bk.Sequences.from_lists(listed, max_new_tokens=3, pad_token=EOS)
    copies = posterior.num_prompts
    index = np.repeat(np.arange(copies), len(listed))
    return np.tile(one.tokens[0], (copies, 1)), np.tile(one.lengths[0], copies), index


@pytest.mark.parametrize("how", ["concrete", "jit", "vmap", "jit of vmap"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_it_is_the_reward_of_every_other_algorithm(likelihood: bk.Likelihood, how: str) -> None:
    posterior = posterior_of(likelihood)
    check_traceable(posterior)
    rows = all_rows(posterior)
    expected = posterior.reward_of_rows(*rows)
    assert len(np.unique(expected)) > 1

    def reward(*arrays: Any) -> Any:
        return traced_reward(posterior, *arrays)

    if "vmap" in how:  # two particles, each with half of the rows
        even = len(expected) // 2 * 2
        halves = [array[:even].reshape(2, -1, *array.shape[1:]) for array in rows]
        function = jax.jit(jax.vmap(reward)) if "jit" in how else jax.vmap(reward)
        found, expected = np.asarray(function(*halves)).ravel(), expected[:even]
    else:
        found = np.asarray((jax.jit(reward) if how == "jit" else reward)(*map(jnp.asarray, rows)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_rewards_are_float64_where_that_is_on() -> None:
    posterior = posterior_of(LIKELIHOODS["traced x callback x text x constraint"])
    rows = all_rows(posterior)
    with jax.enable_x64(True):
        found = jax.jit(lambda *arrays: traced_reward(posterior, *arrays))(*rows)
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, posterior.reward_of_rows(*rows), rtol=0, atol=1e-12)


def looping(tokens: Any, lengths: Any) -> Any:
    return [float(length) for length in lengths]


def branching(tokens: Any, lengths: Any) -> Any:
    return tokens.sum(axis=1) if lengths.max() > 2 else 0.0 * lengths


def writing(tokens: Any, lengths: Any) -> Any:
    tokens[tokens == EOS] = 0
    return tokens.sum(axis=1)


def listing(tokens: Any, lengths: Any) -> Any:
    return [sum(row) for row in tokens.tolist()]


UNTRACEABLE = {
    "numpy": in_numpy,
    "python floats": looping,
    "an if": branching,
    "assignment": writing,
    "lists": listing,
    "a table in numpy": lambda tokens, lengths: np.arange(5.0)[tokens].sum(axis=1),
    "None": lambda tokens, lengths: None,
}


@pytest.mark.parametrize("fn", UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_cannot_be_traced_is_named_before_anything_is_drawn(fn: Any) -> None:
    posterior = posterior_of(bk.TokenReward(fn, alpha=1.0, name="mine"))
    for build in (check_traceable, lambda posterior: posterior.numpyro_model()):
        with pytest.raises(bk.RewardError, match=r"TokenReward 'mine' cannot be traced by JAX, \w+: .*callback=True"):
            build(posterior)
    if fn(np.ones((2, 3), int), np.array([3, 3])) is None:
        return
    on_host = posterior_of(bk.TokenReward(fn, alpha=1.0, callback=True))
    rows = all_rows(on_host)
    found = jax.jit(lambda *arrays: traced_reward(on_host, *arrays))(*rows)
    np.testing.assert_allclose(found, on_host.reward_of_rows(*rows), rtol=1e-6)


@pytest.mark.parametrize(
    "fn", [lambda tokens, lengths: tokens, lambda tokens, lengths: 1.0, lambda tokens, lengths: lengths[:, None]]
)
def test_wrong_shapes_are_found_while_tracing(fn: Any) -> None:
    with pytest.raises(bk.RewardError, match=r"'mine' returned shape \(.*\) for 3 completions"):
        posterior_of(bk.TokenReward(fn, alpha=1.0, name="mine")).numpyro_model()


def failing(texts: Any) -> Any:
    return [1.0 / (len(t) - 2) for t in texts]


def interrupted(texts: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fn, error", [(failing, bk.RewardError), (interrupted, KeyboardInterrupt)])
def test_what_a_callback_raises_is_raised(fn: Any, error: type[BaseException]) -> None:
    posterior = posterior_of(bk.Reward(fn, alpha=1.0, name="mine"))
    rows = tuple(map(jnp.asarray, all_rows(posterior)))
    reward = jax.jit(lambda *arrays: traced_reward(posterior, *arrays))
    message = r"'mine' raised ZeroDivisionError.*at completion \d+ '..'" if error is bk.RewardError else None
    with pytest.raises(error, match=message), host_errors(posterior):
        assert np.isnan(reward(*rows)).all()
    with pytest.raises(error, match=message):  # concrete arrays need no callback
        traced_reward(posterior, *rows)
    with host_errors(posterior):  # nothing is left over
        pass


def test_where_nobody_listens_jax_says_what_the_reward_said(capfd: Any) -> None:
    posterior = posterior_of(bk.Reward(failing, alpha=1.0, name="mine"))
    reward = jax.jit(lambda *arrays: traced_reward(posterior, *arrays))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"Reward 'mine' raised ZeroDivisionError"):
        reward(*all_rows(posterior)).block_until_ready()


def test_a_reward_in_jax_numpy_serves_on_the_host_too() -> None:
    """Importance sampling and SMC on a NumPy prior and on a torch one; the answer is that of the NumPy function."""
    import torch

    from tests.helpers.tiny_models import tiny_gpt2

    priors: list[Any] = [PRIOR, bk.TorchLM(tiny_gpt2(vocab_size=PRIOR.vocab_size))]
    for prior in priors:
        prompts = [[A], [B, A]]
        jax_written = bk.Posterior(
            prior,
            bk.TokenReward(lambda t, n: jnp.where(jnp.arange(3) < n[:, None], t == B, 0).sum(axis=1), alpha=0.5),
            prompts=prompts,
            max_new_tokens=3,
        )
        numpy_written = bk.Posterior(prior, bk.TokenReward(in_numpy, alpha=0.5), prompts=prompts, max_new_tokens=3)
        for algorithm in (bk.ImportanceSampling(50), bk.SMC(32), bk.Exact()):
            with torch.no_grad():
                ours, theirs = algorithm.run(jax_written, seed=0), algorithm.run(numpy_written, seed=0)
            assert ours.reward.dtype == np.float64
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.reward, theirs.reward)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_jax_values_are_checked_on_the_host(value: Any) -> None:
    posterior = posterior_of(bk.TokenReward(lambda tokens, lengths: jnp.where(lengths == 2, value, 1.0), alpha=1.0))
    with pytest.raises(bk.RewardError, match=rf"returned {value} for completion"):
        bk.ImportanceSampling(50).run(posterior, seed=0)
    two_columns = posterior_of(bk.TokenReward(lambda tokens, lengths: jnp.ones((len(lengths), 1)), alpha=1.0))
    with pytest.raises(bk.RewardError, match=r"returned shape \(150, 1\)"):
        bk.ImportanceSampling(50).run(two_columns, seed=0)
