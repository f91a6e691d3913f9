"""A reward that asks for `prompt_index` is told the same number of a prompt, however posteriors of some prompts are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.prompts.part import PosteriorPart
from bayes_klrl.typing import FloatArray, IntArray

LM = bk.NgramLM(np.log([[0.4, 0.2, 0.1, 0.3], [0.1, 0.6, 0.1, 0.2], [0.3, 0.3, 0.2, 0.2], [0.25] * 4]), eos_token_id=3)
PROMPTS = [[0], [1], [2], [0]]
PRICES = np.array([0.3, -1.0, 2.0, 0.7])


def priced(tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
    return PRICES[np.asarray(prompt_index)] * lengths


def sign(tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
    return np.where(np.asarray(prompt_index) % 2, -1.0, 1.0) * lengths


LIKELIHOODS: dict[str, Callable[[], bk.Likelihood]] = {
    "token reward": lambda: bk.TokenReward(priced, alpha=0.7),
    "product": lambda: bk.TokenReward(priced, alpha=0.7) * bk.Power(1.5),
    "quantile": lambda: bk.QuantileReward(bk.TokenReward(sign, alpha=1.0), alpha=0.3, num_reference=None),
    "best of 3": lambda: bk.BestOf(3, bk.TokenReward(sign, alpha=1.0), num_reference=None),
}


def made(name: str) -> bk.Posterior:
    return bk.Posterior(LM, LIKELIHOODS[name](), prompts=PROMPTS, max_new_tokens=3)


def alone(name: str) -> list[float]:
    """Log evidence of each prompt, enumerated by hand from p0 and the reward of the whole."""
    whole = made(name)
    every = bk.Exact().run(whole, seed=0).sequences
    joint = whole.log_prior(every) + whole.log_likelihood(every)
    found: list[float] = np.logaddexp.reduce(joint, axis=1).tolist()
    return found


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_parts_have_the_evidence_of_their_prompts(name: str) -> None:
    whole, expected = made(name), np.array(alone(name))
    first, second = whole.split(0.5, seed=0)
    parts: dict[str, tuple[bk.Posterior, list[int]]] = {
        "selected": (whole.select([3, 1]), [3, 1]),
        "twice": (whole.select([3, 1, 0]).select([2, 0]), [0, 3]),
        "a part of a selection": (PosteriorPart(whole.select([3, 1, 0]), np.array([2])), [0]),
        "a list of one": (whole.select([2]), [2]),
        "the first half": (first, first.prompt_numbers.tolist()),
        "the second half": (second, second.prompt_numbers.tolist()),
    }
    assert sorted([*first.prompt_numbers, *second.prompt_numbers]) == [0, 1, 2, 3]
    for what, (part, numbers) in parts.items():
        assert part.prompt_ids == tuple(tuple(PROMPTS[p]) for p in numbers), what
        found = bk.Exact().run(part, seed=0).log_evidence
        np.testing.assert_allclose(found, expected[numbers], atol=1e-9, err_msg=what)


@pytest.mark.parametrize("name", ["quantile", "best of 3"])
def test_equal_prompts_with_other_scores_have_ranks_of_their_own(name: str) -> None:
    """Prompts 0 and 3 are one text; the score of one rises with the length, that of the other falls."""
    draws = bk.Exact().run(made(name), seed=0)
    mean = (draws.weights * draws.lengths).sum(axis=1)
    of_prior = float((np.exp(draws.log_prior[0]) * draws.lengths[0]).sum())
    assert mean[0] > of_prior + 0.05
    assert mean[3] < of_prior - 0.05


def test_a_ranked_score_of_a_text_shares_its_ranks_among_equal_prompts() -> None:
    """Reference draws are made once for each text: a score that asks for no number is called for three prompts."""
    called: list[int] = []

    def counted(tokens: IntArray, lengths: IntArray) -> FloatArray:
        called.append(len(lengths))
        return lengths * 1.0

    reward = bk.QuantileReward(bk.TokenReward(counted, alpha=1.0), alpha=0.3, num_reference=64)
    bk.ImportanceSampling(5).run(bk.Posterior(LM, reward, prompts=PROMPTS, max_new_tokens=3), seed=0)
    assert called.count(64) == 3


def test_another_alpha_keeps_the_numbers() -> None:
    whole = made("token reward")
    np.testing.assert_array_equal(whole.select([3, 2]).at_alpha(0.1).prompt_numbers, [3, 2])


@pytest.mark.slow
def test_posteriors_that_are_made_of_others_keep_the_numbers() -> None:
    """Beyond the cut of a frontier, and below an uncertain reward."""
    from bayes_klrl.analysis.frontier.extension import posterior_at

    part, numbers = made("token reward").select([3, 2]), [3, 2]
    draws = bk.ImportanceSampling(20).run(part, seed=0)
    np.testing.assert_allclose(posterior_at(part, 0.1).reward(draws), part.reward(draws))
    pytest.importorskip("numpyro")
    model = bk.RewardModel(bk.TokenFeatures(lambda tokens, lengths: lengths[:, None] * 1.0))
    pairs = bk.Preferences([()] * 4, [[0, 3], [1, 0, 3], [0, 3], [3]], [[3], [3], [0, 0, 3], [0, 3]])
    fitted = model.fit(LM, pairs, seed=0)
    uncertain = bk.Posterior(
        LM, fitted.reward(0.7, target="conservative", anchor="mean"), prompts=PROMPTS, max_new_tokens=3
    ).select(numbers)
    for each in (uncertain, uncertain.at_alpha(0.3)):
        factor: Any = each.likelihood.factors[0]
        np.testing.assert_array_equal(factor.base.prompt_numbers, numbers)


def test_traced_rewards_are_told_the_same() -> None:
    jnp = pytest.importorskip("jax.numpy")
    from bayes_klrl.models.programs.traced_rewards import traced_reward

    def traced(tokens: Any, lengths: Any, prompt_index: Any) -> Any:
        return jnp.asarray(PRICES)[prompt_index] * lengths

    for options in ({"callback": False}, {"callback": True}):
        fn = priced if options["callback"] else traced
        part = bk.Posterior(LM, bk.TokenReward(fn, alpha=0.7, **options), prompts=PROMPTS, max_new_tokens=3).select(
            [2, 1]
        )
        tokens, lengths = np.array([[0, 3, 3], [0, 1, 2]]), np.array([2, 3])
        found = traced_reward(part, jnp.asarray(tokens), jnp.asarray(lengths), jnp.array([0, 1]))
        np.testing.assert_allclose(found, [4.0, -3.0], rtol=1e-6)
