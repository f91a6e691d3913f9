"""`generation`: the constraint is Python's `re`, the classifier is right more often than chance, the evidences agree."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.draws import Cost
from bayes_klrl.errors import CheckpointError
from bayes_klrl.gallery.models import style
from tests.examples.gallery import is_short


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    from bayes_klrl.gallery.language import generation as module

    return vars(module)


@pytest.fixture(scope="module")
def prior() -> Any:
    return bk.TorchLM.from_pretrained("austen")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["[^eE]{30,}[.!?]", ".*(happy|delight).*", "[ a-z]{5,40}"])
def test_the_automaton_over_tokens_is_the_regular_expression(example: dict[str, Any], prior: Any, pattern: str) -> None:
    """On completions of the prior, and on random words that make the pattern true more often."""
    automaton = example["token_automaton"](pattern, prior)
    anything = bk.Reward(lambda completions: [0.0] * len(completions), alpha=1.0)
    drawn = bk.ImportanceSampling(300).run(bk.Posterior(prior, anything, prompts="A", max_new_tokens=12), seed=0)
    rng = np.random.default_rng(0)
    words = prior.encode([" so", " I", " happy", " will", " of", "!", ".", " delight", " you", " London", " this"])
    made = [[int(words[i][0]) for i in rng.integers(len(words), size=rng.integers(1, 13))] for _ in range(300)]
    for rows in (_lists(drawn), made):
        texts = prior.decode(rows)
        sequences = bk.Sequences.from_lists(rows, max_new_tokens=12)
        final = automaton.final_states(sequences.tokens[0], sequences.lengths[0])
        expected = [re.fullmatch(pattern, text, flags=re.DOTALL) is not None for text in texts]
        assert np.isin(final, automaton.accepting).tolist() == expected
    assert any(expected)
    assert not all(expected)


def _lists(draws: bk.Draws) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(draws.tokens[0], draws.lengths[0], strict=True)]


@pytest.mark.slow
def test_completions_under_the_constraint_match(example: dict[str, Any], prior: Any) -> None:
    """Every draw of positive weight of twisted SMC fulfils the expression; its evidence is that of filtering, by z-score.

    The expression is easier than the example's: of 30 characters filtering finds two in 4,000, of 8 one in 100.
    """
    pattern, num_tokens = "[^eE]{8,}[.,;!?]", 8
    constraint = bk.AutomatonConstraint(example["token_automaton"](pattern, prior))
    posterior = bk.Posterior(prior, constraint, prompts=example["PROMPT"], max_new_tokens=num_tokens)
    draws = example["methods"]("no letter e", 1, 512)["SMC, twisted"].run(posterior, seed=0)
    alive = np.isfinite(draws.log_weights[0])
    texts = [text for text, there in zip(draws.texts()[0], alive, strict=True) if there]
    assert len(texts) > 200
    assert all(re.fullmatch(pattern, text) for text in texts)
    filtered = bk.ImportanceSampling(4096).run(posterior, seed=1)
    kept = [re.fullmatch(pattern, text) is not None for text in filtered.texts()[0]]
    assert kept == np.isfinite(filtered.log_weights[0]).tolist()
    # the share of hits is small: compare shares, not logs
    share, error = np.exp(draws.log_evidence[0]), np.exp(draws.log_evidence[0]) * draws.log_evidence_se[0]
    assert abs(np.mean(kept) - share) < 4 * np.hypot(error, np.sqrt(share / len(kept)))


def test_length_by_hand(example: dict[str, Any]) -> None:
    assert example["eight_words"](["a b c d e f g h", "", " one  two"]) == [0.0, -8.0, -6.0]


def test_z_score_and_efficiency_by_hand(example: dict[str, Any]) -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    reward = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    posterior = bk.Posterior(coin, reward, max_new_tokens=3)
    one, two = (bk.ImportanceSampling(200).run(posterior, seed=seed) for seed in (0, 1))
    error = np.sqrt(one.log_evidence_se[0] ** 2 + two.log_evidence_se[0] ** 2)
    assert example["z_score"](one, two) == pytest.approx((one.log_evidence[0] - two.log_evidence[0]) / error)
    assert example["per_thousand_tokens"](one) == pytest.approx(1000 * one.ess[0] / one.cost.model_tokens)
    trained = replace(one, cost=Cost(model_tokens=400, training_tokens=600))
    assert example["per_thousand_tokens"](trained) == pytest.approx(one.ess[0] / 0.4)
    assert example["per_thousand_tokens"](trained, training=True) == pytest.approx(one.ess[0])


def test_style_by_hand() -> None:
    """The log odds of a text of three known features, against the formula."""
    weights = np.random.default_rng(0).normal(size=style.NUM_FEATURES)
    classifier = style.StyleClassifier(weights, 0.3)
    once, twice = style.features("Pray")[0], style.features("not")[0]
    pairs = style.features("Pray not not")[3:]
    counts = {once: 1, twice: 2, pairs[0]: 1, pairs[1]: 1}
    expected = 0.3 + sum(weights[i] * n for i, n in counts.items()) / np.sqrt(sum(n * n for n in counts.values()))
    odds = classifier.log_odds(['"Pray not not', ""])
    assert odds == pytest.approx([expected, 0.3])
    assert classifier.log_probs(["Pray not not"]) == pytest.approx([-np.log1p(np.exp(-expected))])
    assert style.StyleClassifier(weights, -100.0).log_probs([""]) == [np.log(style.LEAST)]


def test_a_broken_classifier_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(style, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"examples/train_style\.py"):
        style.StyleClassifier.shipped()


@pytest.mark.slow
def test_the_shipped_classifier_knows_speech_from_narration() -> None:
    """On 300 fragments of chapters that it never saw: both styles right in 80 % at least, chance being 50 %."""
    pairs = style.held_out()
    assert len(pairs) == 300
    assert not any('"' in text for _, text in pairs)
    odds = style.StyleClassifier.shipped().log_odds([text for _, text in pairs])
    truth = np.array([is_speech for is_speech, _ in pairs])
    for kind in (True, False):
        assert ((odds > 0) == truth)[truth == kind].mean() > 0.8
    loss = np.logaddexp(0, np.where(truth, -odds, odds)).mean()
    assert loss < 0.4  # log 2 = 0.69 for a guess


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With three of its five likelihoods: the other two are the factors of the product, and are answered as it is."""
    every = example["likelihoods"]
    kept = ("speech", "cheerful * eight", "no letter e")
    monkeypatch.setitem(example, "likelihoods", lambda prior: {name: every(prior)[name] for name in kept})
    finding = example["main"](tmp_path / "out", num_steps=2, scale=32)
    page = finding.report.read_text(encoding="utf-8")
    assert "speech" in page
    assert len(list((tmp_path / "out").glob("report-*.html"))) == 2
    z = {name.split(", z of")[0]: value for name, value in finding.numbers.items() if "z of prior IS" in name}
    assert f"are {abs(z['speech']):.1f} standard errors apart" in finding.better
    differ = finding.worse.partition("differ by two standard errors for ")[2].partition(".")[0]
    assert differ == " and ".join(name for name, value in z.items() if abs(value) >= 2)
    assert is_short(finding)
