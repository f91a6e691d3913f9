"""Trainings in several threads: Pyro and NumPyro have one stack of handlers for all, so they take turns."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models.programs.turns import NUMPYRO_TURN, PYRO_TURN
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import full_table

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)


def posterior(lm: bk.LanguageModel, token: int) -> bk.Posterior:
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == token).sum(1) * 1.0, alpha=0.7)
    return bk.Posterior(lm, reward, prompts=[[0], [1]], max_new_tokens=4)


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads change places often, so that what can go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def begun(call: Callable[[], Any]) -> Any:
        barrier.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=240) for future in [pool.submit(begun, call) for call in calls]]


def numbers(fit: bk.Fit) -> list[np.ndarray]:
    """All that a training learned, but for the time it took."""
    history = [fit.history[name] for name in sorted(fit.history) if name != "seconds"]
    return [*history, fit.run(20, seed=1).tokens, fit.run(20, seed=1).log_proposal]


def assert_as_in_turn(calls: list[Callable[[], bk.Fit]]) -> None:
    alone = [numbers(call()) for call in calls]
    together = [numbers(fit) for fit in at_once(calls)]
    for before, after in zip(alone, together, strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("estimator", ["leave_one_out", "rao_blackwell"])
def test_two_trainings_on_pyro_are_what_they_are_alone(estimator: str) -> None:
    recipe = bk.SVI(15, 16, estimator=estimator)
    assert_as_in_turn([lambda seed=seed: recipe.fit(posterior(COIN, seed), seed=seed) for seed in (0, 1)])


@pytest.mark.usefixtures("eager_switches")
def test_so_are_bayesian_policies_beside_them() -> None:
    bayesian = bk.BayesianSVI(6, 8, 2, parameters="all", prior_scale=1.0, num_predictive=2)
    assert_as_in_turn(
        [lambda: bayesian.fit(posterior(COIN, 0), seed=0), lambda: bk.SVI(15, 16).fit(posterior(COIN, 1), seed=1)]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("eager_switches")
def test_two_trainings_on_numpyro_are_what_they_are_alone() -> None:
    lm = JaxTable(full_table(COIN, 2))
    recipe = bk.SVI(4, 8)
    assert_as_in_turn([lambda seed=seed: recipe.fit(posterior(lm, seed), seed=seed) for seed in (0, 1)])


@pytest.mark.usefixtures("eager_switches")
def test_losses_in_programs_of_ones_own_take_turns_too() -> None:
    import torch

    from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
    from bayes_klrl.models.torch_lm.table import TableLM

    def losses(token: int) -> list[int]:
        target, guide = posterior(COIN, token), TableLM(COIN)
        elbo, program = LeaveOneOutELBO(8), target.pyro_guide(guide)
        model = target.pyro_model()
        found = []
        for _ in range(20):
            elbo.loss_and_grads(model, program)
            found.append(tuple(elbo.last.log_weights.shape))
        assert isinstance(guide.logits.grad, torch.Tensor)
        return found

    assert at_once([lambda: losses(0), lambda: losses(1)]) == [[(8, 2)] * 20] * 2


def test_a_turn_may_be_taken_twice_by_one_thread_and_is_given_back_after_an_error() -> None:
    def fails(tokens: Any, lengths: Any) -> Any:
        raise ValueError("no")

    broken = bk.Posterior(COIN, bk.TokenReward(fails, alpha=1.0), max_new_tokens=2)
    with PYRO_TURN, PYRO_TURN, NUMPYRO_TURN:
        bk.SVI(1, 2).fit(posterior(COIN, 0), seed=0)
        with pytest.raises(bk.RewardError):
            bk.SVI(1, 2).fit(broken, seed=0)

    def taken_and_given_back() -> bool:
        taken = PYRO_TURN.acquire(timeout=5)
        if taken:  # a thread that ends with the turn would keep it for ever
            PYRO_TURN.release()
        return taken

    assert at_once([taken_and_given_back]) == [True]


def test_the_docstring_says_that_trainings_take_turns() -> None:
    assert "one training at a time" in (bk.SVI.fit.__doc__ or "")
