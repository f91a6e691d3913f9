"""Islands: independent populations merged into one answer, whose evidence is the mean of theirs (theory.md 3.13)."""

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logmeanexp
from tests.runners.posteriors import differing, numbered_posterior

POSTERIOR = numbered_posterior([[0], [1, 2]])
EXACT = bk.Exact().run(POSTERIOR, seed=0)


def twist(posterior: bk.Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
    """A poor one: the number of ones so far."""
    return (prefixes == 1).sum(axis=1) / 2.0


@pytest.mark.slow
def test_the_mean_of_z_hat_is_z_and_of_weighted_rewards_too() -> None:
    """By z-scores over 250 answers of 3 islands of 6 particles, resampled at every step, against the enumerated truth."""
    smc = bk.SMC(6, twist=twist, ess_threshold=1.0, num_islands=3)
    answers = [smc.run(POSTERIOR, seed=seed) for seed in range(250)]
    moved = [(each.info["ancestors"] != np.arange(18)).any() for each in answers]
    assert np.mean(moved) > 0.5  # most were resampled
    ratio = np.exp(np.stack([each.log_evidence for each in answers]) - EXACT.log_evidence)
    z = (ratio.mean(axis=0) - 1) / (ratio.std(axis=0, ddof=1) / np.sqrt(len(ratio)))
    assert (abs(z) < 3.5).all(), z
    weighted = np.stack([(np.exp(each.log_weights) * each.reward).mean(axis=1) for each in answers])
    truth = np.exp(EXACT.log_evidence) * EXACT.mean(EXACT.reward)
    z = (weighted.mean(axis=0) - truth) / (weighted.std(axis=0, ddof=1) / np.sqrt(len(weighted)))
    assert (abs(z) < 3.5).all(), z


@pytest.mark.slow
def test_the_evidence_is_the_mean_of_the_islands_and_the_error_is_of_the_right_size() -> None:
    smc = bk.SMC(64, num_islands=8)
    answers = [smc.run(POSTERIOR, seed=seed) for seed in range(40)]
    for each in answers:
        assert each.shape == (2, 512)
        assert each.info["ancestors"].shape == (2, 5, 512)
        assert np.allclose(logmeanexp(each.info["island_log_evidence"]), each.log_evidence, rtol=0, atol=1e-12)
        assert np.allclose(logmeanexp(each.log_weights), each.log_evidence, rtol=0, atol=1e-12)
    errors = np.stack([(each.log_evidence - EXACT.log_evidence) / each.log_evidence_se for each in answers])
    assert 0.6 < errors.std() < 1.5


def test_an_island_is_the_same_whatever_others_there_are() -> None:
    few, many = (bk.SMC(40, num_islands=num).run(POSTERIOR, seed=2) for num in (2, 30))
    assert np.array_equal(many.tokens[:, :80], few.tokens)
    assert np.allclose(many.log_weights[:, :80], few.log_weights, rtol=0, atol=1e-12)
    assert np.array_equal(many.info["ancestors"][..., :80], few.info["ancestors"])
    assert len({island.tobytes() for island in many.tokens[0].reshape(30, -1)}) == 30  # none is another's copy


def test_one_island_is_a_plain_population() -> None:
    assert not differing(bk.SMC(50).run(POSTERIOR, seed=1), bk.SMC(50, num_islands=1).run(POSTERIOR, seed=1))


def test_a_run_of_log_evidences_is_the_mean_over_its_islands() -> None:
    smc = bk.SMC(16, num_islands=4)
    runs = smc.log_evidences(POSTERIOR, 5, seed=3).log_evidence
    single = bk.SMC(16).log_evidences(POSTERIOR, 20, seed=3).log_evidence
    assert np.allclose(runs, logmeanexp(single.reshape(2, 5, 4)), rtol=0, atol=1e-12)
    assert np.allclose(runs[:, 0], smc.run(POSTERIOR, seed=3).log_evidence, rtol=0, atol=1e-12)
    assert Streams.of(3).entropy == (3,)


def test_islands_that_cannot_be_are_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match="num_islands must be an integer of at least 1"):
        bk.SMC(8, num_islands=0)
    with pytest.raises(bk.BayesKLRLError, match="A conditional run is one population; got num_islands = 2"):
        bk.ConditionalSMC(bk.SMC(8, num_islands=2))
