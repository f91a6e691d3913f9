"""`classification`: the posterior is prior times annotators, by hand; the fit goes to it, and maximum likelihood elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.gallery.data.novels import MASK, NOVELS, Passages, passages
from bayes_klrl.gallery.models.label_lm import LabelLM
from bayes_klrl.gallery.models.passages_lm import SYMBOLS, passages_lm
from tests.examples.gallery import is_short

K = len(NOVELS)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    from bayes_klrl.gallery.decisions import classification as module

    return vars(module)


@pytest.fixture(scope="module")
def prior() -> LabelLM:
    return passages_lm()


@pytest.fixture(scope="module")
def some() -> Passages:
    return passages("unseen").select(range(0, 240, 20))


@pytest.fixture(scope="module")
def votes(example: dict[str, Any], some: Passages) -> np.ndarray:
    return example["simulated_votes"](some.labels, np.random.default_rng(1))


@pytest.fixture(scope="module")
def by_hand(example: dict[str, Any], prior: LabelLM, some: Passages, votes: np.ndarray) -> np.ndarray:
    """p0(label | passage) times the probability of each vote, (P, K), not normalised."""
    joint = prior.label_probs(some.prompts)
    for matrix, said in zip(example["ANNOTATORS"], votes.T, strict=True):
        for p, answer in enumerate(said):
            joint[p] *= [matrix[label, answer] for label in range(K)]
    return joint


def test_the_posterior_is_prior_times_annotators(
    example: dict[str, Any], prior: LabelLM, some: Passages, votes: np.ndarray, by_hand: np.ndarray
) -> None:
    posterior = example["problem"](prior, some, votes)
    exact = bk.Exact().run(posterior, seed=0)
    assert np.allclose(exact.log_evidence, np.log(by_hand.sum(axis=1)), atol=1e-6)
    assert np.allclose(example["label_posterior"](exact), by_hand / by_hand.sum(axis=1, keepdims=True), atol=1e-6)
    assert exact.weights[:, : len(SYMBOLS)].max() == 0.0  # no character is an answer
    bk.check_posterior(posterior.select(range(2))).raise_if_broken()


def test_votes_come_from_the_matrices(example: dict[str, Any]) -> None:
    """Each cell of each confusion matrix, by z-score of its frequency."""
    matrices, num = example["ANNOTATORS"], 2000
    assert np.allclose(matrices.sum(axis=2), 1.0)
    label = 3
    said = example["simulated_votes"](np.full(num, label), np.random.default_rng(0))
    for matrix, answers in zip(matrices, said.T, strict=True):
        expected = matrix[label]
        z = (np.bincount(answers, minlength=K) / num - expected) / np.sqrt(expected * (1 - expected) / num)
        assert np.abs(z).max() < 4
    favourite = NOVELS.index("Pride and Prejudice")
    assert matrices[2][label, favourite] > 0.35 > matrices[0][label, favourite]


def test_the_certificate_holds_the_exact_distance(
    example: dict[str, Any], prior: LabelLM, some: Passages, votes: np.ndarray, by_hand: np.ndarray
) -> None:
    """KL(prior || posterior) of each passage, in NumPy, lies in the bounds, as wide as the rounding of the models."""
    posterior = example["problem"](prior, some, votes).select(range(4))
    certificate = bk.certify(posterior, prior, seed=0, num_draws=32)
    p0, exact = prior.label_probs(some.prompts[:4]), by_hand[:4] / by_hand[:4].sum(axis=1, keepdims=True)
    distance = (p0 * (np.log(p0) - np.log(exact))).sum(axis=1)
    low, high = certificate.reverse_kl.T
    assert (low <= distance).all()
    assert (distance <= high).all()
    assert (high - low).max() < 3e-4


def test_unseen_passages_are_of_other_chapters_and_have_no_names() -> None:
    labelled, unseen = passages("labelled"), passages("unseen")
    assert not set(labelled.prompts) & set(unseen.prompts)
    assert set(labelled.chapters % 20) == {0}  # validation and test of `austen`
    assert set(unseen.chapters % 20) == {10}
    for some in (labelled, unseen):
        assert np.bincount(some.labels).tolist() == [40] * K
        text = "\n".join(some.prompts)
        assert MASK in text
        assert not re.search(
            r"Emma|Knightley|Fanny|Crawford|Tilney|Wentworth|Anne\b|Darcy|Bennet|Elinor|Marianne", text
        )
    with pytest.raises(bk.BayesKLRLError, match="no part 'seen'"):
        passages("seen")


def test_reliability_and_scores_by_hand(example: dict[str, Any]) -> None:
    """Two bins: 0.9 right once in two, 0.6 right twice in two; the calibration error is (0.4 * 2 + 0.4 * 2) / 4."""
    probs = np.full((4, K), 0.0)
    probs[:2, 0], probs[:2, 1] = 0.9, 0.1
    probs[2:, 2], probs[2:, 3] = 0.6, 0.4
    labels = np.array([0, 1, 2, 2])
    assert np.allclose(example["reliability"](probs, labels), [[2, 0.6, 1.0], [2, 0.9, 0.5]])
    scores = example["judged"](probs, labels, np.arange(4))
    assert np.isclose(scores["ECE"], 0.4)
    assert np.isclose(scores["accuracy"], 0.75)
    assert np.isclose(scores["log loss (nats)"], -np.log([0.9, 0.1, 0.6, 0.6]).mean())
    assert np.allclose(example["shared_by_ties"](np.array([[2.0, 2.0, 1.0]])), [[0.5, 0.5, 0.0]])


def test_the_prior_knows_something(prior: LabelLM) -> None:
    """On passages of other chapters its log loss is below that of guessing, by more than four standard errors."""
    unseen = passages("unseen")
    losses = -np.log(prior.label_probs(unseen.prompts)[np.arange(240), unseen.labels])
    assert (np.log(K) - losses.mean()) / (losses.std(ddof=1) / 240**0.5) > 4


def test_other_characters_are_refused(prior: LabelLM) -> None:
    with pytest.raises(bk.BayesKLRLError, match="has the character 'ß', which is not among the symbols"):
        prior.encode(["Straße"])


@pytest.mark.slow
def test_the_fit_goes_to_the_posterior_and_maximum_likelihood_to_the_majority(
    example: dict[str, Any], prior: LabelLM, some: Passages, votes: np.ndarray, by_hand: np.ndarray
) -> None:
    before = prior.label_probs(some.prompts)
    fit = example["fitted"](prior, some, votes, 150, 0)
    exact = by_hand / by_hand.sum(axis=1, keepdims=True)
    q = fit.guide.label_probs(some.prompts)

    def distance(probs: np.ndarray) -> float:
        return float((probs * (np.log(probs) - np.log(exact))).sum(axis=1).mean())

    assert distance(q) < 0.02 * distance(before)
    target = example["shared_by_ties"](example["vote_counts"](votes))
    most_likely = example["most_likely"](prior, some, target, 150).label_probs(some.prompts)
    assert np.abs(most_likely - target).mean() < 0.5 * np.abs(exact - target).mean()
    assert np.array_equal(prior.label_probs(some.prompts), before)  # both trained copies


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: dict[str, Any], tmp_path: Path) -> None:
    finding = example["main"](tmp_path / "out", num_steps=5, per_novel=2, num_unseen=24, num_draws=64)
    page = finding.report.read_text(encoding="utf-8")
    assert page.count("<figure>") == 4
    assert finding.picture.is_file()
    assert f"{100 * finding.numbers['posterior: accuracy']:.0f} % of cases" in finding.better
    assert is_short(finding)
