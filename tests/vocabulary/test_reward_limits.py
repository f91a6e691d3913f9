"""Names that a reward cannot ask for, and rewards so large that float64 no longer sees the prior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.batch import RESERVED_NAMES
from bayes_klrl.reward_models.features import FeatureMap

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
TEXT = bk.NgramLM.fit(["ab", "ba", "b"], order=2)


# --- names ------------------------------------------------------------------------------------------------------

TRL = ("environments", "trainer_state", "log_extra", "log_metric")


def reward_of(name: str) -> Callable[..., Any]:
    """A function whose only parameter has this name."""
    made: Callable[..., Any] = eval(f"lambda {name}: [0.0] * len({name})")  # noqa: S307  (names of this file)
    return made


@pytest.mark.parametrize("kind", [lambda fn: bk.Reward(fn, alpha=1.0), bk.Constraint], ids=["reward", "constraint"])
@pytest.mark.parametrize("name", [*TRL, "prompt", "tokens", "lengths", "prompt_index", "prior", "max_new_tokens"])
def test_a_reserved_name_does_not_receive_the_completions(name: str, kind: Callable[[Any], bk.Likelihood]) -> None:
    with pytest.raises(bk.RewardError, match=rf"asks for '{name}'.*'completion_ids', 'completions', 'finished', 'k'"):
        bk.Posterior(TEXT, kind(reward_of(name)), max_new_tokens=2, k=[1])


def test_nor_do_features() -> None:
    with pytest.raises(bk.RewardError, match="asks for 'trainer_state'"):
        bk.RewardModel(reward_of("trainer_state"), num_draws=2, num_warmup=2).fit(
            TEXT, bk.Preferences("", ["a", "b"], ["b", "ab"]), seed=0
        )


@pytest.mark.parametrize("name", ["completions", "texts", "x", "completion", "responses"])
def test_any_other_name_does(name: str) -> None:
    posterior = bk.Posterior(TEXT, bk.Reward(reward_of(name), alpha=1.0), max_new_tokens=2)
    assert posterior.reward([TEXT.encode(["ab"])[0]]).tolist() == [[0.0]]


def test_a_column_of_such_a_name_is_what_it_says() -> None:
    reward = bk.Reward(lambda environments: [float(e) for e in environments], alpha=1.0)
    assert bk.Posterior(TEXT, reward, max_new_tokens=2, environments=[7]).reward([[0, 1]]).tolist() == [[7.0]]


def test_further_names_are_told_as_before_and_optional_ones_are_left_alone() -> None:
    with pytest.raises(bk.RewardError, match=r"asks for \['trainer_state'\]"):
        bk.Posterior(TEXT, bk.Reward(lambda completions, trainer_state: [], alpha=1.0), max_new_tokens=2)
    trl = bk.Reward(lambda completions, trainer_state=None, **kwargs: [1.0] * len(completions), alpha=1.0)
    assert bk.Posterior(TEXT, trl, max_new_tokens=2).reward([[0, 1]]).tolist() == [[1.0]]
    assert {"tokens", "prior"} <= RESERVED_NAMES


# --- sizes ------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "importance": bk.ImportanceSampling(20),
    "SMC": bk.SMC(20),
    "annealed": bk.AnnealedSMC(20),
    "exact": bk.Exact(),
    "best of n": bk.BestOfN(2, num_draws=4),
    "suffix": bk.SuffixMH(2, num_draws=4),
}


class TwoRewards:
    """An uncertain reward of two draws, of a given size."""

    from_preferences = False

    def __init__(self, size: float) -> None:
        self.features = FeatureMap(
            bk.TokenFeatures(lambda tokens, lengths: (tokens[:, 0] == 0)[:, None] * size), np.zeros(1), None, np.ones(1)
        )

    def thetas(self, num: int | None = None) -> np.ndarray:
        return np.array([[1.0], [1.1]])


def first(size: float) -> Callable[..., Any]:
    return lambda tokens, lengths: np.where(tokens[:, 0] == 0, size, 0.0)


def likelihoods(size: float) -> dict[str, Callable[[], bk.Likelihood]]:
    """Likelihoods whose largest r / alpha is `size`, in all the ways of writing one."""
    starts_with_0 = bk.Automaton([[1, 2, 2], [1, 1, 1], [2, 2, 2]])
    small = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    half = first(size / 2)
    return {
        "tokens": lambda: bk.TokenReward(first(size), alpha=1.0),
        "list": lambda: bk.TokenReward(lambda tokens, lengths: [size] * len(tokens), alpha=1.0),
        "alpha": lambda: bk.TokenReward(first(size * 1e-3), alpha=1e-3),
        "product": lambda: bk.TokenReward(first(size), alpha=1.0) * small,
        "product of alphas": lambda: small * bk.TokenReward(first(size * 1e-2), alpha=1e-2),
        "sum": lambda: bk.TokenReward(half, alpha=1.0) * bk.TokenReward(half, alpha=1.0),
        "tempered": lambda: bk.TokenReward(first(size / 1e6), alpha=1.0) ** 1e6,
        "automaton": lambda: bk.AutomatonReward(starts_with_0, final_rewards=[0.0, size, 0.0], alpha=1.0),
        "automaton's tokens": lambda: bk.AutomatonReward(starts_with_0, token_rewards=[size, 0.0, 0.0], alpha=1.0),
        "cut": lambda: bk.EnsembleReward(TwoRewards(size), alpha=1.0, num_thetas=2),
        "joint": lambda: bk.EnsembleReward(TwoRewards(size), alpha=1.0, num_thetas=2, target="joint"),
        "plug-in": lambda: bk.EnsembleReward(TwoRewards(size), alpha=1.0, num_thetas=2, target="plug-in"),
        "conservative": lambda: bk.EnsembleReward(
            TwoRewards(size), alpha=1.0, num_thetas=2, target="conservative", anchor="mean"
        ),
    }


@pytest.mark.parametrize("size", [-1e308, -1e18, 1e18, 1e308, -1.7e308])
@pytest.mark.parametrize("name", likelihoods(1.0))
def test_rewards_of_more_nats_than_float64_resolves_are_refused(name: str, size: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(bk.RewardError, match=r"1e\+12 nats.*-inf"):
            bk.Posterior(COIN, likelihoods(size)[name](), max_new_tokens=2).reward([[0, 2], [1, 2]])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [-1e308, 1e18])
def test_every_algorithm_passes_the_refusal_on(name: str, size: float) -> None:
    posterior = bk.Posterior(COIN, bk.TokenReward(first(size), alpha=1.0), max_new_tokens=2)
    with pytest.raises(bk.RewardError, match=rf"returned {size:g}".replace("+", r"\+") + r".*first|<lambda>"):
        ALGORITHMS[name].run(posterior, seed=0)


def test_automata_answer_exactly_and_refuse_all_the_same() -> None:
    counts = bk.Automaton.counts(0, modulo=2, vocab_size=3)
    reward = bk.AutomatonReward(counts, token_rewards=np.full((2, 3), 9e11), alpha=1.0)
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        bk.Exact(num_draws=5).run(bk.Posterior(COIN, reward, max_new_tokens=40), seed=0)


def test_a_product_is_refused_though_its_factors_are_not() -> None:
    reward = bk.TokenReward(first(9e11), alpha=1.0)
    posterior = bk.Posterior(COIN, reward * reward, max_new_tokens=2)
    with pytest.raises(bk.RewardError, match=r"returned 1\.8e\+12 for completion 0"):
        posterior.reward([[0, 2]])


def test_what_float64_resolves_is_as_it_was() -> None:
    reward = bk.TokenReward(first(-9e11), alpha=1.0)
    posterior = bk.Posterior(COIN, reward, max_new_tokens=2)
    assert posterior.log_likelihood([[0, 2], [1, 2]]).tolist() == [[-9e11, 0.0]]
    excluded = bk.Posterior(COIN, bk.TokenReward(first(-np.inf), alpha=1e-3), max_new_tokens=2)
    assert excluded.log_likelihood([[0, 2]]).tolist() == [[-np.inf]]


def test_the_message_names_the_completion_and_the_cure() -> None:
    posterior = bk.Posterior(
        TEXT, bk.Reward(lambda texts: [-1e20] * len(texts), alpha=0.5, name="big"), max_new_tokens=2
    )
    with pytest.raises(bk.RewardError) as caught:
        posterior.reward([[0, 1]])
    for part in ("'big'", "-1e+20", "'ab'", "alpha = 0.5", "-inf"):
        assert part in str(caught.value)


def test_another_alpha_is_no_way_around() -> None:
    posterior = bk.Posterior(COIN, bk.TokenReward(first(1e6), alpha=1.0), max_new_tokens=2)
    colder = posterior.likelihood**1e8
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        colder.log_likelihood(np.array([1e6]))
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        bk.frontier(posterior, num_draws=50, alphas=[1.0, 1e-8], seed=0)
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        bk.frontier(posterior, num_draws=50, seed=0).at(1e-8)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e300])
def test_alpha_leaves_room_for_rewards(alpha: float) -> None:
    with pytest.raises(bk.BayesKLRLError, match="alpha must lie between 1e-280 and"):
        bk.TokenReward(first(1.0), alpha=alpha)


@pytest.mark.slow
@pytest.mark.parametrize("size, callback", [(1e18, False), (-1e18, True), (1e30, False)])
def test_rewards_traced_by_jax_are_refused_too(size: float, callback: bool) -> None:
    jnp = pytest.importorskip("jax.numpy")
    from tests.helpers.backends import prior_on

    reward = bk.TokenReward(
        lambda tokens, lengths: (jnp if not callback else np).where(tokens[:, 0] == 0, size, 0.0),
        alpha=1.0,
        callback=callback,
    )
    posterior = bk.Posterior(prior_on("jax", COIN), reward, prompts=[[0]], max_new_tokens=2)
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        bk.SVI(num_steps=2, num_particles=8).fit(posterior, seed=0)


@pytest.mark.parametrize("size", [1e18, -1e308])
def test_svi_refuses_them_on_pyro(size: float) -> None:
    posterior = bk.Posterior(COIN, bk.TokenReward(first(size), alpha=1.0), max_new_tokens=2)
    with pytest.raises(bk.RewardError, match=r"1e\+12 nats"):
        bk.SVI(num_steps=2, num_particles=8).fit(posterior, seed=0)
