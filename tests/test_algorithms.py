"""What every algorithm promises, judged on each row of `tests.algorithms`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bayes_klrl as bk
from tests.algorithms import ROWS, Row
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth, chi_square_p, counts, random_posterior

pytestmark = pytest.mark.usefixtures("large_blocks")

PER_DRAW = ("reward", "log_prior", "log_likelihood", "log_weights")
PER_PROMPT = ("log_evidence", "log_evidence_se", "elbo", "ess", "pareto_k")


def by_name(row: Row) -> str:
    return row.name


def small() -> bk.Posterior:
    """Two prompts, a reward with declared bounds that are wide enough for its values."""
    base = random_posterior(1, prompts=((0,), (1, 2)), num_tokens=4)
    reward = bk.TokenReward(
        lambda tokens, lengths: (tokens == 1).sum(axis=1) / 2 - lengths / 4, alpha=0.5, bounds=(-1, 1.5)
    )
    return bk.Posterior(base.prior, reward, prompts=[[0], [1, 2]], max_new_tokens=4, topic=["a", "b"])


def transformer() -> bk.Posterior:
    """The same kind of posterior on a GPT-2."""
    lm = bk.TorchLM(tiny_gpt2(), eos_token_id=0)
    reward = bk.TokenReward(lambda tokens, lengths: lengths / 4, alpha=0.5, bounds=(0, 1))
    return bk.Posterior(lm, reward, prompts=[[1], [2, 3]], max_new_tokens=3)


def is_algorithm(value: object) -> bool:
    """Whether a public name is a class whose `run` takes a posterior and a seed, and nothing else that it must be given."""
    if not (inspect.isclass(value) and dataclasses.is_dataclass(value) and hasattr(value, "run")):
        return False
    required = [
        name
        for name, parameter in inspect.signature(value.run).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    return required == ["self", "posterior", "seed"]


def test_every_public_algorithm_has_one_row() -> None:
    public = [name for name in bk.__all__ if is_algorithm(getattr(bk, name))]
    assert sorted(row.name for row in ROWS) == sorted(public)


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_it_is_a_frozen_set_of_options(row: Row) -> None:
    algorithm, again = row.make(6), row.make(6)
    assert type(algorithm) is getattr(bk, row.name)
    assert isinstance(algorithm, bk.Algorithm)
    assert algorithm == again != row.make(8)
    field = dataclasses.fields(algorithm)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(algorithm, field, 3)
    run = inspect.signature(algorithm.run).parameters
    assert list(run)[:3] == ["posterior", "seed", "progress"]
    assert set(list(run)[3:]) <= {"runner"}  # of SMC, whose islands it spreads
    assert [run[name].kind for name in ("seed", "progress")] == [inspect.Parameter.KEYWORD_ONLY] * 2
    assert run["progress"].default is False


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_draws_have_the_shapes_and_numbers_they_should(row: Row) -> None:
    posterior = small()
    draws = row.make(20).run(posterior, seed=0)
    assert draws.method == row.name
    assert draws.tokens.shape == (2, 20, 4)
    assert draws.lengths.shape == (2, 20)
    for name in PER_DRAW:
        values = getattr(draws, name)
        assert values.shape == (2, 20), name
        assert values.dtype == np.float64, name
        assert not np.isnan(values).any(), name
    assert draws.log_proposal.shape == (2, 20)
    assert np.isfinite(draws.log_proposal).all() == row.has_density
    for name in PER_PROMPT:
        assert getattr(draws, name).shape == (2,), name
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=1e-5)
    np.testing.assert_allclose(draws.reward, posterior.reward(draws), rtol=0, atol=1e-12)
    np.testing.assert_allclose(draws.log_likelihood, draws.reward / 0.5, rtol=0, atol=1e-12)
    assert draws.seconds > 0


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_the_log_evidence_is_that_of_the_weights(row: Row) -> None:
    draws = row.make(40).run(small(), seed=1)
    if row.weighted:
        mean = np.log(np.exp(draws.log_weights).mean(axis=1))
        np.testing.assert_allclose(draws.log_evidence, mean, rtol=0, atol=1e-12)
        assert (draws.ess <= 40 + 1e-9).all()
    else:
        assert (draws.log_weights == 0).all()
        assert np.isnan(draws.log_evidence).all() or row.name == "Exact"
    if row.trains:
        assert draws.guide is not None
        assert draws.training_tokens > 0
        mean = (draws.log_prior + draws.log_likelihood - draws.log_proposal).mean(axis=1)
        np.testing.assert_allclose(draws.elbo, mean, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, transformer])
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_same_seed_same_draws(row: Row, make: Callable[[], bk.Posterior]) -> None:
    """Whatever global generators do."""
    import torch

    algorithm, posterior = row.make(20), make()
    first = algorithm.run(posterior, seed=3)
    np.random.seed(1)  # noqa: NPY002  (global state must not matter)
    torch.manual_seed(1)
    again, other = algorithm.run(make(), seed=3), algorithm.run(posterior, seed=4)
    for field in ("tokens", "lengths", "log_weights", "log_proposal", "log_evidence", "elbo"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_draws_are_saved_and_exported(row: Row, tmp_path: Path) -> None:
    draws = row.make(12).run(small(), seed=2)
    loaded = bk.Draws.load(draws.save(tmp_path / "draws.nc"))
    for name in ("tokens", "lengths", *PER_DRAW, *PER_PROMPT):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(draws, name))
    assert loaded.method == row.name
    exported = draws.to_arviz()
    assert exported.posterior["reward"].sizes["prompt"] == 2
    assert np.isfinite(exported.posterior["reward"].to_numpy()).all()


@pytest.mark.parametrize("row", [row for row in ROWS if row.law == "posterior"], ids=by_name)
def test_draws_follow_the_posterior(row: Row) -> None:
    """One draw of each of 600 independent runs, by their weights, against enumeration."""
    base = small()
    prior, likelihood = base.prior, base.likelihood
    many = bk.Posterior(prior, likelihood, prompts=[[0]] * 600, max_new_tokens=4)
    truth = Truth(bk.Posterior(prior, likelihood, prompts=[[0]], max_new_tokens=4))
    drawn = row.make(200 if row.weighted else 6).run(many, seed=5).resample(1, seed=6)
    assert chi_square_p(counts(truth, drawn.tokens[:, 0]), truth.p[0]) > 0.001
    assert chi_square_p(counts(truth, drawn.tokens[:, 0]), np.exp(truth.log_prior[0])) < 1e-6  # it could fail


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.law != "posterior"], ids=by_name)
def test_the_others_are_nearer_to_it_than_the_prior_or_say_why_not(row: Row) -> None:
    """Best-of-n has a law of its own with more reward than the prior; a guide after a few steps has a higher ELBO."""
    posterior = small()
    prior = bk.ImportanceSampling(2000).run(posterior, seed=0)
    draws = row.make(2000).run(posterior, seed=0)
    if row.law == "own":
        assert (draws.reward.mean(axis=1) > prior.reward.mean(axis=1) + 4 * prior.reward.std(axis=1) / 2000**0.5).all()
    else:
        longer = dataclasses.replace(row.make(2000), num_steps=60)  # type: ignore[type-var]
        trained = longer.run(posterior, seed=0)
        assert trained.elbo.mean() > prior.elbo.mean()
        assert (trained.elbo < Truth(posterior).log_evidence + 4 * 0.05).all()
