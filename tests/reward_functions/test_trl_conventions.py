"""What TRL's `reward_funcs` may be, a `bk.Reward` may be: lists with weights, async functions, None, modules."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.reward_functions.coroutines import awaited
from tests.helpers.truth import Truth
from tests.helpers.user_models import TextLM

COMPLETIONS = [[0, 1, 3], [2, 3], [1, 1, 1], [3]]  # "01", "2", "111", ""
LENGTHS = np.array([2.0, 1.0, 3.0, 0.0])
ONES = np.array([1.0, 0.0, 3.0, 0.0])


def posterior(likelihood: bk.Likelihood, **columns: Any) -> bk.Posterior:
    return bk.Posterior(TextLM(), likelihood, prompts="1", max_new_tokens=3, **columns)


def rewards(likelihood: bk.Likelihood, **columns: Any) -> list[float]:
    values: list[float] = posterior(likelihood, **columns).reward(COMPLETIONS)[0].tolist()
    return values


def text_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def num_ones(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text.count(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def unless_empty(completions: list[str]) -> list[float | None]:
    return [len(text) if text else None for text in completions]


def only_the_two(completions: list[str]) -> list[float | None]:
    return [5.0 if text == "2" else None for text in completions]


# ---- lists


def test_a_list_is_the_weighted_sum_and_each_is_called_by_its_own_signature() -> None:
    both = bk.Reward([text_length, num_ones], alpha=0.5, weights=[2, -0.5])
    assert rewards(both, answer=["1"]) == (2 * LENGTHS - 0.5 * ONES).tolist()
    assert both.label == "text_length + num_ones"
    assert rewards((both**3.0) * both, answer=["1"]) == (8 * (2 * LENGTHS - 0.5 * ONES)).tolist()  # in nats
    assert rewards(bk.Reward((text_length, num_ones), alpha=1.0), answer=["1"]) == (LENGTHS + ONES).tolist()
    assert rewards(bk.Reward(text_length, alpha=1.0, weights=3.0)) == (3 * LENGTHS).tolist()


def test_a_list_is_the_product_of_its_factors() -> None:
    summed = bk.Reward([text_length, num_ones], alpha=0.7, weights=[0.3, -1.0])
    product = bk.Reward(text_length, alpha=0.7 / 0.3) * bk.Reward(num_ones, alpha=0.7, weights=[-1.0])
    ours, theirs = (Truth(posterior(each, answer=["1"])) for each in (summed, product))
    np.testing.assert_allclose(ours.log_evidence, theirs.log_evidence, atol=1e-12)
    np.testing.assert_allclose(ours.p, theirs.p, atol=1e-12)


def test_bounds_are_those_of_the_sum() -> None:
    assert rewards(bk.Reward([text_length, num_ones], alpha=1.0, bounds=(0, 6)), answer=["1"])[2] == 6
    with pytest.raises(bk.RewardError, match=r"'text_length \+ num_ones' returned 6.0, outside .* '111'"):
        rewards(bk.Reward([text_length, num_ones], alpha=1.0, bounds=(0, 5)), answer=["1"])


def test_weight_0_switches_a_function_off_though_it_excludes() -> None:
    excluding = bk.Reward([text_length, lambda texts: [-np.inf] * len(texts)], alpha=1.0, weights=[1.0, 0.0])
    assert rewards(excluding) == LENGTHS.tolist()
    with pytest.raises(bk.RewardError, match="returned inf"):  # -inf with a negative weight
        rewards(bk.Reward(lambda texts: [-np.inf] * len(texts), alpha=1.0, weights=[-1.0]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, np.nan], [1.0, np.inf], "ab", [[1.0, 2.0]]])
def test_weights_are_one_finite_number_for_each_function(weights: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="one finite number for each function, 2 in all"):
        bk.Reward([text_length, num_ones], alpha=1.0, weights=weights)


def test_an_error_names_the_function_of_the_list() -> None:
    with pytest.raises(bk.RewardError, match=r"'num_ones' asks for \['answer'\]"):
        posterior(bk.Reward([text_length, num_ones], alpha=1.0))
    with pytest.raises(bk.RewardError, match=r"'unlucky' raised ZeroDivisionError: .* completion 3 ''"):
        rewards(bk.Reward([text_length, unlucky], alpha=1.0))
    with pytest.raises(bk.RewardError, match=r"'<lambda>' returned nan for completion 0 '01'"):
        rewards(bk.Reward([text_length, lambda texts: [np.nan] * len(texts)], alpha=1.0))


def unlucky(completions: list[str]) -> list[float]:
    return [1 / len(text) for text in completions]


def test_moments_are_constrained_with_a_list_and_with_an_async_feature() -> None:
    """A negative lambda turns the signs of the weights."""
    found = bk.moment_constraint(
        TextLM(), [bk.Reward(async_length, alpha=1.0)], [0.5], prompts="1", max_new_tokens=3, seed=0
    )
    assert found.lambdas[0] < 0
    truth = Truth(found.posterior)
    lengths = posterior(bk.Reward(text_length, alpha=1.0)).reward(truth.sequences)
    np.testing.assert_allclose((truth.p * lengths).sum(), 0.5, atol=1e-6)


# ---- None


def test_none_does_not_apply_so_its_factor_is_1_and_that_is_said_once() -> None:
    reward = bk.Reward([unless_empty, only_the_two], alpha=0.5, weights=[1.0, 2.0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = rewards(reward), rewards(reward**2.0)
    assert values == ([2, 11, 3, 0], [2, 11, 3, 0])
    assert [str(one.message)[:55] for one in said] == [
        "Reward 'unless_empty' returned None for completion 3 ''",
        "Reward 'only_the_two' returned None for completion 0 '0",
        "All functions of the reward 'unless_empty + only_the_tw",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewards(reward) == [2, 11, 3, 0]


def test_a_single_function_may_return_none_too() -> None:
    with pytest.warns(UserWarning, match="'unless_empty' returned None.*its factor of the likelihood is 1"):
        assert rewards(bk.Reward(unless_empty, alpha=0.5)) == [2, 1, 3, 0]


def test_none_is_no_value_of_a_bounded_reward_unless_0_is() -> None:
    reward = bk.Reward(unless_empty, alpha=0.5, bounds=(1, 3))
    with pytest.warns(UserWarning, match="None"), pytest.raises(bk.RewardError, match=r"returned 0\.0, outside"):
        rewards(reward)


def test_none_has_no_rank() -> None:
    for likelihood in (bk.BestOf(3, unless_empty), bk.QuantileReward(bk.Reward(unless_empty, alpha=1.0), alpha=0.2)):
        with pytest.raises(bk.RewardError, match=r"'unless_empty' returned None for completion .* '' .*ranked"):
            rewards(likelihood)


# ---- async


async def async_length(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return text_length(completions)


class AsyncObject:
    async def __call__(self, completions: list[str], **kwargs: Any) -> np.ndarray:
        return np.array(await async_length(completions))


async def async_times(factor: float, completions: list[str]) -> list[float]:
    return [factor * value for value in text_length(completions)]


ASYNC: dict[str, Callable[..., Any]] = {
    "function": async_length,
    "object": AsyncObject(),
    "bound method": AsyncObject().__call__,
    "partial": functools.partial(async_times, 1.0),
    "function that returns a coroutine": lambda y: async_times(1.0, y),
}


@pytest.mark.parametrize("case", ASYNC)
def test_async_functions_are_awaited(case: str) -> None:
    assert rewards(bk.Reward(ASYNC[case], alpha=1.0)) == LENGTHS.tolist()


def test_also_inside_a_running_event_loop() -> None:
    async def notebook() -> list[float]:
        return rewards(bk.Reward(async_length, alpha=1.0))

    assert asyncio.run(notebook()) == LENGTHS.tolist()


def test_and_inside_an_async_reward() -> None:
    async def nested(completions: list[str]) -> list[float]:
        return rewards(bk.Reward(async_length, alpha=1.0))

    assert rewards(bk.Reward(nested, alpha=1.0)) == LENGTHS.tolist()


def test_async_functions_of_a_list_run_concurrently() -> None:
    """Each waits for the other, so one after the other would not end."""
    arrived: list[asyncio.Event] = []

    def meeting(own: int) -> Callable[..., Any]:
        async def meet(completions: list[str]) -> list[float]:
            arrived.append(asyncio.Event())
            while len(arrived) < 2:
                await asyncio.sleep(0.001)
            return [float(own)] * len(completions)

        return meet

    reward = bk.Reward([meeting(1), text_length, meeting(10)], alpha=1.0)
    assert rewards(reward) == (LENGTHS + 11).tolist()


def test_they_share_one_loop_so_that_a_client_stays_usable() -> None:
    loops = []

    async def reward(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return text_length(completions)

    for _ in range(2):
        rewards(bk.Reward(reward, alpha=1.0))
    assert loops[0] is loops[1]


def test_an_async_function_that_raises_shows_the_completion() -> None:
    async def fails(completions: list[str]) -> list[float]:
        return [1 / len(text) for text in completions]

    with pytest.raises(bk.RewardError, match=r"'fails' raised ZeroDivisionError: .* completion 3 ''") as caught:
        rewards(bk.Reward([async_length, fails], alpha=1.0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def exits(completions: list[str]) -> list[float]:
    raise SystemExit("no key")


async def cancelled(completions: list[str]) -> list[float]:
    task = asyncio.create_task(asyncio.sleep(9))
    await asyncio.sleep(0)
    task.cancel()
    await task
    return []


async def exits_in_a_task(completions: list[str]) -> list[float]:
    await asyncio.create_task(exits(completions))
    return []


async def nested_exit(completions: list[str]) -> list[float]:
    return rewards(bk.Reward(exits_in_a_task, alpha=1.0))


@pytest.mark.parametrize("fn", [exits, exits_in_a_task, nested_exit])
def test_system_exit_reaches_the_caller_and_the_loop_goes_on(fn: Any) -> None:
    with pytest.raises(SystemExit, match="no key"):
        rewards(bk.Reward([async_length, fn], alpha=1.0))
    assert rewards(bk.Reward(async_length, alpha=1.0)) == LENGTHS.tolist()


def test_a_task_of_the_functions_own_that_was_cancelled_is_an_error_of_the_reward() -> None:
    with pytest.raises(bk.RewardError, match=r"'cancelled' raised CancelledError.* completion 0 '01'"):
        rewards(bk.Reward([async_length, cancelled], alpha=1.0))

    def without_a_loop(completions: list[str]) -> list[float]:
        return asyncio.run(cancelled(completions))

    with pytest.raises(bk.RewardError, match=r"'without_a_loop' raised CancelledError.* completion 0 '01'"):
        rewards(bk.Reward(without_a_loop, alpha=1.0))


def test_nothing_is_left_unawaited_when_another_function_raises() -> None:
    with pytest.raises(bk.RewardError, match="'unlucky' raised"):  # a warning about it would be an error
        rewards(bk.Reward([async_length, unlucky], alpha=1.0))
    assert awaited([]) == []


# ---- modules


class Scorer(torch.nn.Module):
    """A module whose `__call__` takes everything, and whose `forward` takes the completions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, completions: list[str]) -> torch.Tensor:
        return self.dropout(self.scale * torch.tensor([float(len(text)) for text in completions]))


class ScorerOfColumns(Scorer):
    def forward(self, texts: list[str], answer: list[str] | None = None) -> torch.Tensor:  # type: ignore[override]
        assert answer == ["yes"] * len(texts)
        return super().forward(texts)


class ScorerOfIds(torch.nn.Module):
    def forward(self, completion_ids: list[list[int]]) -> list[float]:
        assert not torch.is_grad_enabled()
        return [2.0 * sum(token != 3 for token in ids) for ids in completion_ids]


@pytest.mark.parametrize("module", [Scorer(), ScorerOfColumns(), ScorerOfIds()], ids=["texts", "column", "ids"])
def test_a_module_gets_what_its_forward_asks_for(module: torch.nn.Module) -> None:
    assert rewards(bk.Reward(module, alpha=1.0), answer=["yes"]) == (2 * LENGTHS).tolist()
    assert rewards(bk.Reward(functools.partial(module), alpha=1.0), answer=["yes"])[3] == 0.0
    assert all(part.training for part in module.modules())  # dropout was off during the call, and is on again


def test_a_model_of_transformers_or_a_folder_is_a_classifier_reward() -> None:
    import transformers as hf

    config = hf.GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1, num_labels=1)
    for given in (hf.GPT2ForSequenceClassification(config), "owner/reward-model", [text_length, "a folder"]):
        with pytest.raises(bk.BayesKLRLError, match=r"bk\.ClassifierReward"):
            bk.Reward(given, alpha=1.0)  # type: ignore[arg-type]


# ---- what trainers give


def test_functions_that_log_can_do_so_into_the_void() -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any = None, **kwargs: Any) -> list[float]:
        log_extra("length", text_length(completions))
        log_metric("mean", 1.0)
        assert not {"log_extra", "trainer_state"} & set(kwargs)
        return text_length(completions)

    def sole(texts: list[str], *, log_metric: Any) -> list[float]:
        log_metric("mean", 1.0)
        return text_length(texts)

    assert rewards(bk.Reward([logs, sole], alpha=1.0)) == (2 * LENGTHS).tolist()
    column = bk.Reward(lambda completions, log_extra: [float(value) for value in log_extra], alpha=1.0)
    assert rewards(column, log_extra=[7]) == [7.0] * 4


def test_there_is_no_trainer_whose_state_could_be_given() -> None:
    with pytest.raises(bk.RewardError, match=r"asks for \['trainer_state'\].*a default, such as trainer_state=None"):
        posterior(bk.Reward(lambda completions, trainer_state: [], alpha=1.0))
