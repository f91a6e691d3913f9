"""`soft_values`: the values are log psi, and each learner comes near the exact posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk


@pytest.fixture(scope="module")
def soft_values() -> dict[str, Any]:
    from bayes_klrl.gallery.decisions import soft_values as module

    return vars(module)


def test_soft_values_are_log_psi(soft_values: dict[str, Any]) -> None:
    """The backward values against `Exact`'s evidence, and the twist made of them: weights of no variance."""
    posterior, q = soft_values["problem"](), soft_values["exact_values"]()
    exact = bk.Exact(num_draws=10).run(posterior, seed=0)
    value = soft_values["soft_max"](q[0])[0]
    assert abs(value - exact.log_evidence[0]) < 1e-9
    assert abs(soft_values["distance"](q)) < 1e-9
    twist = soft_values["twist_of"](q)
    draws = bk.SMC(20, twist=twist, proposal=bk.TwistedLM(posterior, twist)).run(posterior, seed=0)
    assert np.ptp(draws.log_weights) < 1e-9
    assert abs(draws.log_evidence[0] - value) < 1e-9


def test_the_distance_is_that_of_the_certificate(soft_values: dict[str, Any]) -> None:
    """KL(policy || posterior) by messages lies in the bounds of `certify`."""
    posterior = soft_values["problem"]()
    q = soft_values["exact_values"]() + np.random.default_rng(0).normal(0, 0.2, (soft_values["STEPS"], 25, 4))
    policy = bk.TwistedLM(posterior, soft_values["twist_of"](q))
    # the policy of a twist is that of values after the action, so q must be one backup of its own values
    backed = np.stack(
        [
            soft_values["REWARD"] + (soft_values["soft_max"](q[t + 1])[soft_values["AFTER"]] if t + 1 < len(q) else 0.0)
            for t in range(len(q))
        ]
    )
    certificate = bk.certify(posterior, policy, seed=0, failure_probability=1e-3)
    low, high = certificate.reverse_kl[0]
    assert low <= soft_values["distance"](backed) <= high
    assert high - low < 0.5


@pytest.mark.slow
def test_each_learner_comes_near_and_the_example_ends_in_a_report(soft_values: dict[str, Any], tmp_path: Path) -> None:
    distance = soft_values["distance"]
    first = distance(np.zeros((soft_values["STEPS"], 25, 4)))
    for number, learner in enumerate(soft_values["LEARNERS"].values()):
        *_, q = learner(600, np.random.default_rng(number))
        assert distance(q) < 0.3 * first
    page = soft_values["main"](tmp_path / "out", num_walks=60).report.read_text(encoding="utf-8")
    assert page.count("<figure>") == 4
    assert "log evidence -1.105 nats, exactly (exact)" in page
