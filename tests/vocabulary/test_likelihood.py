"""Rewards as likelihoods: their algebra, how functions are called, and what they see."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from tests.helpers.user_models import RecurrentLM, TextLM

COMPLETIONS = [[0, 1, 3], [2, 3], [1, 1, 1], [3]]
TEXTS = ["01", "2", "111", ""]
LENGTHS = np.array([2.0, 1.0, 3.0, 0.0])


def posterior(likelihood: bk.Likelihood, prior: Any = None, **options: Any) -> bk.Posterior:
    return bk.Posterior(prior or TextLM(), likelihood, **{"prompts": "1", "max_new_tokens": 3} | options)


def log_likelihood(likelihood: bk.Likelihood) -> np.ndarray:
    return posterior(likelihood).log_likelihood(COMPLETIONS)[0]


def text_length(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def num_ones(completions: list[str]) -> list[int]:
    return [text.count("1") for text in completions]


ONES = np.array([1.0, 0.0, 3.0, 0.0])


# ---- algebra


def test_same_alpha_rewards_add() -> None:
    product = bk.Reward(text_length, alpha=0.5) * bk.Reward(num_ones, alpha=0.5)
    assert product.alpha == 0.5
    np.testing.assert_allclose(posterior(product).reward(COMPLETIONS)[0], LENGTHS + ONES)
    np.testing.assert_allclose(log_likelihood(product), (LENGTHS + ONES) / 0.5)


def test_different_alphas_make_alpha_1_and_the_reward_the_log_likelihood() -> None:
    product = bk.Reward(text_length, alpha=0.5) * bk.Reward(num_ones, alpha=4.0)
    assert product.alpha == 1
    np.testing.assert_allclose(posterior(product).reward(COMPLETIONS)[0], LENGTHS / 0.5 + ONES / 4)
    np.testing.assert_allclose(log_likelihood(product), LENGTHS / 0.5 + ONES / 4)


@pytest.mark.parametrize("gamma", [0.5, 1, 3.0])
def test_a_power_tempers_a_product_as_it_tempers_its_factors(gamma: float) -> None:
    a, b = bk.Reward(text_length, alpha=0.5), bk.Reward(num_ones, alpha=4.0)
    for likelihood in (a, a * b, a * a):
        np.testing.assert_allclose(log_likelihood(likelihood**gamma), gamma * log_likelihood(likelihood))
    assert (a**gamma).alpha == 0.5 / gamma
    np.testing.assert_allclose(log_likelihood((a * b) ** gamma), log_likelihood(a**gamma * b**gamma))


def test_products_associate_and_commute() -> None:
    a, b = bk.Reward(text_length, alpha=0.5), bk.Reward(num_ones, alpha=4.0)
    c = bk.TokenReward(lambda tokens, lengths: -lengths, alpha=2.0)
    expected = log_likelihood(a) + log_likelihood(b) + log_likelihood(c)
    for product in (a * b * c, a * (b * c), c * a * b):
        np.testing.assert_allclose(log_likelihood(product), expected)


no_two = bk.Constraint(lambda completions: ["2" not in text for text in completions], name="no two")


@pytest.mark.parametrize("power", [1, 0.01, 100.0])
def test_a_constraint_has_no_alpha_and_is_untouched_by_powers(power: float) -> None:
    assert (no_two**power).alpha is None
    np.testing.assert_array_equal(log_likelihood(no_two**power), [0, -np.inf, 0, 0])
    assert posterior(no_two).alpha == posterior(no_two * no_two).alpha == 1
    both = no_two * bk.Reward(text_length, alpha=0.5)
    assert both.alpha == 0.5
    np.testing.assert_allclose(log_likelihood(both**power), [4 * power, -np.inf, 6 * power, 0])
    np.testing.assert_array_equal(posterior(both).reward(COMPLETIONS)[0], [2, -np.inf, 3, 0])


@pytest.mark.parametrize(
    "likelihood, bounds",
    [
        (bk.Reward(text_length, alpha=0.5, bounds=(0, 3)), (0, 3)),
        (bk.Reward(text_length, alpha=0.5, bounds=(0, 3)) ** 2, (0, 3)),
        (
            bk.Reward(text_length, alpha=0.5, bounds=(0, 3)) * bk.Reward(num_ones, alpha=0.5, bounds=(-1, 4)),
            (-1, 7),
        ),
        (
            bk.Reward(text_length, alpha=0.5, bounds=(0, 3)) * bk.Reward(num_ones, alpha=2.0, bounds=(-1, 4)),
            (-0.5, 8),
        ),
        (bk.Reward(text_length, alpha=0.5, bounds=(0, 3)) * bk.Reward(num_ones, alpha=2.0), None),
        (bk.Reward(text_length, alpha=0.5, bounds=(1, 3)) * no_two, (-np.inf, 3)),
        (no_two, (-np.inf, 0)),
    ],
)
def test_bounds_are_those_of_the_products_reward(likelihood: bk.Likelihood, bounds: Any) -> None:
    assert likelihood.bounds == bounds


def test_values_outside_declared_bounds_are_an_error_that_shows_the_completion() -> None:
    with pytest.raises(bk.RewardError, match=r"'text_length' returned 3.0, outside .* '111'"):
        log_likelihood(bk.Reward(text_length, alpha=1.0, bounds=(0, 2)))


def test_names_are_the_functions_or_the_given_ones() -> None:
    product = bk.Reward(text_length, alpha=1.0) * bk.Reward(num_ones, alpha=1.0, name="ones") * no_two
    assert product.name == "text_length * ones * no two"


@pytest.mark.parametrize("other", [2.0, None, "a", text_length])
def test_a_likelihood_is_multiplied_by_likelihoods_only(other: Any) -> None:
    with pytest.raises(TypeError):
        _ = no_two * other


# ---- how functions of text are called


class Counter:
    def __call__(self, completions: list[str]) -> list[int]:
        return text_length(completions)

    def method(self, texts: list[str]) -> list[int]:
        return text_length(texts)


def scaled(completions: list[str], factor: float) -> list[float]:
    return [factor * len(text) for text in completions]


def trl_style(prompts: list[str], completions: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
    assert prompts == ["1"] * len(completions)
    assert set(kwargs) == {"answer", "finished"}
    assert [len(ids) - finished for ids, finished in zip(completion_ids, kwargs["finished"], strict=True)] == [
        len(text) for text in completions
    ]
    return text_length(completions)


def sweeping(texts: list[str], **kwargs: Any) -> list[int]:
    assert set(kwargs) == {"prompts", "completion_ids", "finished", "answer"}
    return text_length(texts)


def everything(*args: Any, **kwargs: Any) -> list[int]:
    assert not args
    return text_length(kwargs["completions"])


CALLS: dict[str, Callable[..., Any]] = {
    "by name": text_length,
    "sole parameter of any name": lambda y: [len(text) for text in y],
    "sole parameter with a default": lambda y=None: text_length(y),
    "sole parameter, positional only": lambda y, /: [len(text) for text in y],
    "*args": lambda *args: text_length(args[0]),
    "by name, in any order": lambda finished, completions, prompts: text_length(completions),
    "keyword only": lambda *, completions: text_length(completions),
    "unknown default": lambda completions, weight=1: [weight * len(text) for text in completions],
    "known default": lambda y, answer=None: [len(text) * (a == "yes") for text, a in zip(y, answer, strict=True)],
    "a column": lambda completions, answer: [
        len(text) * (a == "yes") for text, a in zip(completions, answer, strict=True)
    ],
    "ids alone": lambda completion_ids: [sum(i != 3 for i in ids) for ids in completion_ids],
    "TRL": trl_style,
    "sole parameter and **kwargs": sweeping,
    "*args and **kwargs": everything,
    "callable object": Counter(),
    "bound method": Counter().method,
    "partial by name": functools.partial(scaled, factor=1.0),
    "partial by position": functools.partial(lambda factor, y: scaled(y, factor), 1.0),
    "array": lambda y: np.array(text_length(y), dtype=np.float32),
    "integers": lambda y: np.array(text_length(y)),
    "NumPy scalars in a list": lambda y: list(np.array(text_length(y))),
    "tuple": lambda y: tuple(text_length(y)),
    "tensor with gradient": lambda y: torch.tensor(text_length(y), dtype=torch.float32, requires_grad=True),
    "bfloat16 tensor": lambda y: torch.tensor(text_length(y), dtype=torch.bfloat16),
    "tensors in a list": lambda y: [torch.tensor(float(len(text)), requires_grad=True) for text in y],
}


@pytest.mark.parametrize("case", CALLS)
def test_every_way_of_writing_a_reward_gives_the_same(case: str) -> None:
    likelihood = bk.Reward(CALLS[case], alpha=1.0)
    reward = posterior(likelihood, answer=["yes"]).reward(COMPLETIONS)
    assert reward.dtype == np.float64
    np.testing.assert_array_equal(reward, LENGTHS[None])


def test_columns_and_prompts_stand_beside_their_own_completions() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, finished: Any, weight: Any) -> np.ndarray:
        seen.update(locals())
        return np.arange(len(completions))

    two = posterior(bk.Reward(reward, alpha=1.0), prompts=["0", "12"], weight=[7, 8], max_new_tokens=2)
    xs = bk.Sequences(np.array([[[0, 3], [3, 9], [1, 1]], [[2, 3], [0, 0], [3, 0]]]), np.array([[2, 1, 2], [2, 2, 1]]))
    np.testing.assert_array_equal(two.reward(xs), [[0, 1, 2], [3, 4, 5]])
    assert seen["prompts"] == ["0"] * 3 + ["12"] * 3
    assert seen["weight"] == [7] * 3 + [8] * 3
    assert seen["completions"] == ["0", "", "11", "2", "00", ""]
    assert seen["completion_ids"] == [[0, 3], [3], [1, 1], [2, 3], [0, 0], [3]]
    assert seen["finished"] == [True, True, False, True, False, True]


def test_prompts_given_as_ids_are_seen_as_ids() -> None:
    likelihood = bk.Reward(lambda prompts: [float(sum(ids)) for ids in prompts], alpha=1.0)
    two = posterior(likelihood, RecurrentLM(), prompts=[[1, 2], [0]])
    np.testing.assert_array_equal(two.reward(bk.Sequences(np.full((2, 1, 1), 3), np.ones((2, 1), int))), [[3], [0]])


def test_what_one_factor_does_to_its_lists_the_next_does_not_see() -> None:
    def vandal(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        num = len(completions)
        completions.clear()
        for ids in completion_ids:
            ids.clear()
        return [0.0] * num

    spoiled = bk.Reward(vandal, alpha=1.0)
    count_ids = bk.Reward(lambda completion_ids: [len(ids) for ids in completion_ids], alpha=1.0)
    product = spoiled * bk.Reward(text_length, alpha=1.0) * count_ids
    np.testing.assert_array_equal(log_likelihood(product), LENGTHS + np.array([3, 2, 3, 1]))


# ---- functions of tokens


@pytest.mark.parametrize("eos, pad", [((3,), 3), ((3, 2), 2), ((), 0)])
def test_past_a_completion_stands_eos_or_0_and_never_what_was_given(eos: tuple, pad: int) -> None:
    seen = []
    likelihood = bk.TokenReward(lambda tokens, lengths: seen.append(tokens) or lengths, alpha=1.0)
    lm = RecurrentLM(eos_token_ids=eos)
    row, length = ([1, 1, 3, -1, -1], 3) if eos else ([1, 1, 1, 1, 1], 5)
    posterior(likelihood, lm, prompts=[1], max_new_tokens=5).reward(
        bk.Sequences(np.array([[row]]), np.array([[length]]))
    )
    assert seen[0].tolist() == [[1, 1, 3, pad, pad] if eos else row]
    bk.SMC(20).run(posterior(likelihood, lm, prompts=[1], max_new_tokens=5), seed=0)
    for tokens in seen:
        assert tokens.min() >= 0
        assert tokens.shape[1] == 5


def test_prompt_index_says_whose_completion_it_is() -> None:
    likelihood = bk.TokenReward(lambda tokens, lengths, prompt_index: prompt_index, alpha=1.0)
    three = posterior(likelihood, RecurrentLM(), prompts=[[0], [1], [2]], max_new_tokens=2)
    for algorithm in (bk.ImportanceSampling(4), bk.SMC(4), bk.BestOfN(2, 4)):
        reward = algorithm.run(three, seed=0).reward
        np.testing.assert_array_equal(reward, [[0] * 4, [1] * 4, [2] * 4])


def vandal_of_arrays(tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    reward = lengths.astype(float)
    tokens[:], lengths[:], prompt_index[:] = 0, 1, 7
    return reward


def wrapped(*args: Any, **kwargs: Any) -> np.ndarray:
    """What a decorator leaves of a signature; the function inside knows no prompt_index."""

    def inside(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return lengths

    return inside(*args, **kwargs)


TOKEN_CALLS: dict[str, Callable[..., Any]] = {
    "two parameters": lambda tokens, lengths: lengths,
    "any names": lambda x, n: n,
    "default": lambda tokens, lengths=None: lengths,
    "prompt_index": lambda tokens, lengths, prompt_index: lengths + prompt_index,
    "prompt_index, keyword only": lambda tokens, lengths, *, prompt_index: lengths + prompt_index,
    "prompt_index, optional": lambda tokens, lengths, prompt_index=None: lengths + prompt_index,
    "*args and **kwargs": wrapped,
    "partial": functools.partial(lambda scale, tokens, lengths: scale * lengths, 1.0),
    "writes into its arrays": vandal_of_arrays,
}


@pytest.mark.parametrize("case", TOKEN_CALLS)
def test_every_way_of_writing_a_token_reward_gives_the_same(case: str) -> None:
    likelihood = bk.TokenReward(TOKEN_CALLS[case], alpha=1.0)
    lengths = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    np.testing.assert_array_equal(log_likelihood(likelihood * lengths), [6, 4, 6, 2])


# ---- refused when the posterior is made


@pytest.mark.parametrize(
    "fn",
    [
        text_length,
        lambda y: [len(text) for text in y],
        lambda y, **kwargs: text_length(y),
        lambda completions, **kwargs: text_length(completions),
        Counter(),
    ],
)
@pytest.mark.parametrize("kind", [functools.partial(bk.Reward, alpha=1.0), bk.Constraint])
def test_text_without_a_tokenizer(kind: Callable[..., bk.Likelihood], fn: Callable[..., Any]) -> None:
    with pytest.raises(bk.TextRewardError, match="no tokenizer"):
        posterior(bk.TokenReward(lambda t, n: n, alpha=1.0) * kind(fn), RecurrentLM(), prompts=[1])


def test_ids_without_a_tokenizer_are_fine_swept_up_or_by_name() -> None:
    for fn in (
        lambda completion_ids: [len(ids) for ids in completion_ids],
        lambda **kwargs: [len(ids) for ids in kwargs["completion_ids"]],
        lambda completion_ids, **kwargs: [len(ids) * ("completions" not in kwargs) for ids in completion_ids],
    ):
        likelihood = bk.Reward(fn, alpha=1.0)
        np.testing.assert_array_equal(
            posterior(likelihood, RecurrentLM(), prompts=[1]).reward(COMPLETIONS), [[3, 2, 3, 1]]
        )


@pytest.mark.parametrize(
    "likelihood, says",
    [
        (bk.Reward(lambda completions, label: completions, alpha=1.0), r"asks for \['label'\].*name=\["),
        (bk.Constraint(lambda texts, prompts: texts), r"asks for \['texts'\]"),
        (bk.TokenReward(lambda tokens: tokens, alpha=1.0), r"must take \(tokens, lengths\)"),
        (bk.TokenReward(lambda tokens, prompt_index: tokens, alpha=1.0), r"must take \(tokens, lengths\)"),
        (bk.TokenReward(lambda tokens, lengths, answer: tokens, alpha=1.0), "parameters are .*'answer'"),
    ],
)
def test_parameters_that_nobody_can_fill(likelihood: bk.Likelihood, says: str) -> None:
    with pytest.raises(bk.RewardError, match=says):
        posterior(likelihood)
