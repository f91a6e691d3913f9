"""`image_classification`: the posterior by hand, the Bayes decision as its limit, and a certificate that is right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.gallery.data.digits import LEVELS, Images, parts_of_digits
from bayes_klrl.gallery.models.digits_lm import calibrate, digits_lm
from bayes_klrl.gallery.models.label_lm import LabelLM
from tests.examples.gallery import is_short


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    from bayes_klrl.gallery.decisions import image_classification as module

    return vars(module)


@pytest.fixture(scope="module")
def images(example: dict[str, Any]) -> Mapping[str, Images]:
    return parts_of_digits(example["SIZES"], "unseen", seed=0)


@pytest.fixture(scope="module")
def prior(images: Mapping[str, Images]) -> LabelLM:
    return digits_lm(images["training"], images["calibration"], seed=0, steps=30)


@pytest.fixture(scope="module")
def some(images: Mapping[str, Images]) -> Images:
    unseen = images["unseen"]
    return Images(unseen.numbers[:30], unseen.pixels[:30], unseen.labels[:30])


def expected_cost(prior: LabelLM, some: Images) -> np.ndarray:
    """sum_y p0(y | image) cost(a, y), by loops, (P, 10)."""
    belief, found = prior.label_probs(some.prompts), np.zeros((len(some.labels), 10))
    for a in range(10):
        for y in range(10):
            found[:, a] += belief[:, y] * (10.0 * (a - y) if a > y else float(y - a))
    return found


@pytest.mark.parametrize("alpha", [0.3, 1.0, 30.0])
def test_the_posterior_is_prior_times_exp_of_minus_cost(
    example: dict[str, Any], prior: LabelLM, some: Images, alpha: float
) -> None:
    joint = prior.label_probs(some.prompts) * np.exp(-expected_cost(prior, some) / alpha)
    posterior = example["problem"](prior, some, alpha)
    exact = bk.Exact().run(posterior, seed=0)
    assert np.allclose(exact.log_evidence, np.log(joint.sum(axis=1)), atol=1e-4)
    assert np.allclose(example["exact_policy"](posterior), joint / joint.sum(axis=1, keepdims=True), atol=1e-5)
    assert exact.weights[:, : len(LEVELS)].max() == 0.0  # no grey level is an answer


def test_its_limits_are_the_bayes_decision_and_the_belief(
    example: dict[str, Any], prior: LabelLM, some: Images
) -> None:
    posterior, cost = example["problem"](prior, some), expected_cost(prior, some)
    gap = np.diff(np.sort(cost, axis=1)[:, :2])[:, 0]  # between the best digit and the next
    unlikely = -np.log(prior.label_probs(some.prompts)[np.arange(30), cost.argmin(axis=1)])
    clear = gap > 1e-3 * (unlikely + 20)  # at alpha 1e-3 the reward then outweighs the prior by 20 nats
    assert clear.sum() > 25
    cold = example["exact_policy"](posterior.at_alpha(1e-3))
    assert np.allclose(cold[clear], np.eye(10)[cost.argmin(axis=1)][clear], atol=1e-6)
    assert np.allclose(example["decided"](-cost)[clear], cold[clear], atol=1e-6)
    warm = example["exact_policy"](posterior.at_alpha(1e9))
    assert np.allclose(warm, prior.label_probs(some.prompts), atol=1e-6)
    assert (cost.argmin(axis=1) != prior.label_probs(some.prompts).argmax(axis=1)).any()


def test_no_policy_is_above_the_log_evidence(example: dict[str, Any], prior: LabelLM, some: Images) -> None:
    """E_q[r] / alpha - KL(q || p0) of any policy is at most log Z, and equal for the posterior: its cost is the least."""
    posterior, cost, belief = (
        example["problem"](prior, some),
        expected_cost(prior, some),
        prior.label_probs(some.prompts),
    )
    log_z = bk.Exact().run(posterior, seed=0).log_evidence
    kl, exact = example["divergence"], example["exact_policy"](posterior)

    def elbo(policy: np.ndarray) -> np.ndarray:
        return -(policy * cost).sum(axis=1) / example["ALPHA"] - kl(policy, belief)

    assert np.allclose(elbo(exact), log_z, atol=1e-4)
    others = np.random.default_rng(0).dirichlet(np.full(10, 0.3), size=30)
    for policy in (others, belief, example["decided"](belief), example["tilted"](belief, -np.arange(10.0))):
        gap = log_z - elbo(policy)
        assert (gap > -1e-4).all()
        assert np.allclose(gap, kl(policy, exact), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sampling_only", [False, True])
def test_the_certificate_holds_the_exact_distance(
    example: dict[str, Any], prior: LabelLM, some: Images, *, sampling_only: bool
) -> None:
    """KL(guide || posterior), in NumPy, lies in the bounds, for a guide whose weights are not the prior's."""
    guide, few = copy.deepcopy(prior), Images(some.numbers[:6], some.pixels[:6], some.labels[:6])
    with torch.no_grad():
        for weights in guide.parameters():
            weights.mul_(0.8)
    posterior = example["problem"](prior, few, 10.0)
    certificate = bk.certify(
        posterior, guide, seed=0, num_draws=256, num_runs=8, failure_probability=1e-3, sampling_only=sampling_only
    )
    q = guide.label_probs(few.prompts)
    distance = (q * (np.log(q) - np.log(example["exact_policy"](posterior)))).sum(axis=1)
    low, high = certificate.reverse_kl.T
    assert (low <= distance).all()
    assert (distance <= high).all()
    assert sampling_only or (high - low).max() < 3e-4  # the rounding of the models
    assert distance.min() > 1e-3


def test_unseen_images_are_not_among_the_others(images: Mapping[str, Images]) -> None:
    numbers = np.concatenate([part.numbers for part in images.values()])
    assert np.array_equal(np.sort(numbers), np.arange(1797))
    others = {prompt for name, part in images.items() if name != "unseen" for prompt in part.prompts}
    assert not others & set(images["unseen"].prompts)


def test_the_temperature_is_undone(images: Mapping[str, Images], prior: LabelLM) -> None:
    """Weights of the last layer that are twice too large are halved again, up to the grid of temperatures."""
    hot = copy.deepcopy(prior)
    last: Any = list(hot.head.children())[-1]
    with torch.no_grad():
        for weights in last.parameters():
            weights.mul_(2.0)
    step = 10 ** (1.5 / 60)
    assert 2 / step < calibrate(hot, last, images["calibration"]) < 2 * step
    assert np.abs(hot.label_probs(images["unseen"].prompts) - prior.label_probs(images["unseen"].prompts)).max() < 0.03


def test_scores_by_hand(example: dict[str, Any]) -> None:
    """Two images: a 7 declared as 1 costs 6; a 1 declared as 7 half of the time costs 60 half of the time."""
    policy, prior = np.zeros((2, 10)), np.full((2, 10), 0.1)
    policy[0, 1], policy[1, 1], policy[1, 7] = 1.0, 0.5, 0.5
    scores = example["judged"](policy, prior, np.array([7, 1]))
    assert np.isclose(scores["cost"], (6 + 30) / 2)
    assert np.isclose(scores["KL"], (np.log(10) + np.log(5)) / 2)
    assert np.isclose(scores["accuracy"], 0.5)
    assert scores["log loss"] == np.inf
    saved, error = example["saving"](policy, np.eye(10)[[7, 7]], np.array([7, 1]))
    assert np.isclose(saved, (-6 + 30) / 2)
    assert np.isclose(error, 18.0)


@pytest.mark.slow
def test_tuning_comes_nearer_to_the_posterior_of_unseen_images(
    example: dict[str, Any], images: Mapping[str, Images], prior: LabelLM
) -> None:
    recipe = bk.SVI(100, 16, prompts_per_step=100, learning_rate=5e-3, max_step_kl=0.1)
    fit: Any = recipe.fit(example["problem"](prior, images["tuning"]), seed=0)
    unseen = images["unseen"]
    exact = example["exact_policy"](example["problem"](prior, unseen))
    before, after = (example["divergence"](lm.label_probs(unseen.prompts), exact).mean() for lm in (prior, fit.guide))
    assert after < 0.4 * before


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: dict[str, Any], tmp_path: Path) -> None:
    finding = example["main"](tmp_path / "out", num_steps=3, num_certified=12, num_other_seeds=1)
    page = finding.report.read_text(encoding="utf-8")
    assert page.count("<figure>") == 5
    assert finding.picture.is_file()
    assert np.isfinite(list(finding.numbers.values())).all()
    # by the prior's belief no policy costs less than the Bayes decision
    expected = [
        finding.numbers[f"{name}: cost that the prior expects"] for name in (example["BAYES"], example["TUNED"])
    ]
    assert expected[0] <= expected[1]
    assert "of 1 other seeds" in finding.worse
    assert is_short(finding)
    assert (
        f"it saves {finding.numbers['Bayes decision saves against argmax of the prior (cost)']:.2f}" in finding.better
    )
