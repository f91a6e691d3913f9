"""`explain`: the colours sum to the posterior's log-ratio, and what a guide's lack is log q / p*."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.gallery.language import explain
from bayes_klrl.inference.exact.messages import backward_messages
from tests.examples.gallery import is_short


@pytest.fixture(scope="module")
def posterior() -> bk.Posterior:
    """A trigram model of characters, a reward per token and one for the last state, solved by messages."""
    texts = ["a cat sat on a mat", "the cat ran", "a rat sat", "the rat ate the hat", "a hat!", "oh! the cat!"]
    letters = bk.NgramLM.fit(texts, order=3)
    size, rng = letters.vocab_size, np.random.default_rng(0)
    automaton = bk.Automaton.counts(
        letters.encode(["a"])[0], modulo=3, vocab_size=size, eos_token_ids=letters.eos_token_ids
    )
    reward = bk.AutomatonReward(
        automaton, token_rewards=rng.normal(size=size), final_rewards=[0.0, 1.0, -1.0], alpha=0.7
    )
    return bk.Posterior(letters, reward, prompts="the ", max_new_tokens=12)


def test_the_colours_sum_to_the_log_ratio(posterior: bk.Posterior) -> None:
    """The chain rule for the posterior by messages, to 1e-9; the KL by position sums to the posterior's KL to its prior."""
    solved = backward_messages(posterior)
    found = explain.explained(posterior, solved.policy(), solved.draw(400, seed=0))
    log_ratio = posterior.log_likelihood(found.sequences)[0] - solved.log_evidence[0]
    assert np.ptp(log_ratio) > 1
    assert abs(found.ratios.sum(axis=1) - log_ratio).max() < 1e-9
    assert abs(found.missing(solved.log_evidence[0])).max() < 1e-9
    per_draw = found.kl.sum(axis=1)
    assert abs(per_draw.mean() - solved.moments().kl[0]) < 4 * per_draw.std() / 20
    assert abs(found.moved.sum()) < 1e-9
    past = np.arange(12) >= found.sequences.lengths[0][:, None]
    assert past.any()
    assert not found.ratios[past].any()
    assert not found.kl[past].any()
    assert ["".join(row) for row in found.pieces] == posterior.prior.decode(found.sequences.lists())


def test_the_same_where_all_completions_are_enumerated() -> None:
    """The posterior's own table of next-token log-probs; and a guide's colours lack log q / p*, whose mean is its KL."""
    letters = bk.NgramLM.fit(["abab", "ba", "abba"], order=2)
    reward = bk.Reward(lambda texts: [len(text) * text.count("ab") for text in texts], alpha=2.0)
    posterior = bk.Posterior(letters, reward, prompts="a", max_new_tokens=4)
    exact = bk.Exact().run(posterior, seed=0)
    policy = bk.posterior_policy(posterior).language_model()
    found = explain.explained(posterior, policy, exact.sequences)
    assert abs(found.missing(exact.log_evidence[0])).max() < 1e-9

    guide = bk.NgramLM.fit(["aab", "b", "bab"], order=2, tokenizer=letters.tokenizer)
    of_guide = explain.explained(posterior, guide, exact.sequences)
    log_guide = bk.Posterior(guide, reward, prompts="a", max_new_tokens=4).log_prior(exact.sequences)[0]
    log_posterior = (exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None])[0]
    missing = of_guide.missing(exact.log_evidence[0])
    assert np.allclose(missing, log_guide - log_posterior, atol=1e-9)
    divergence = (np.exp(log_guide) * missing).sum()
    assert divergence > 0.1
    assert np.allclose(bk.certify(posterior, guide, seed=0).reverse_kl[0], divergence, atol=1e-6)


def test_the_share_of_silent_tokens(posterior: bk.Posterior) -> None:
    sequences = bk.Sequences.from_lists([[0, 1, 2], [1, 1]], max_new_tokens=3)
    ratios = np.array([[1.0, -2.0, 0.5], [-0.5, 0.25, 0.0]])
    found = explain.Explanation(sequences, [], ratios, ratios, ratios[0], ratios[0])
    assert np.isclose(explain.share_of_silent(found, np.array([0.0, 3.0, 0.0])), 1.5 / 4.25)


def test_tokens_are_placed_without_gaps() -> None:
    pieces = [" It's", " a", "\n", "", " long" * 30, "!"]
    placed: list[Any] = explain._placed(pieces, np.arange(6.0))
    assert [text for _, _, text, _ in placed[1:]] == [" It's", " a", " ", "■", " long" * 30, "!"]
    assert [ratio for *_, ratio in placed[1:]] == list(range(6))
    assert placed[1][0] == len(explain.PROMPT)
    assert placed[5][:2] == (0, 1)


@pytest.mark.slow
def test_the_example_ends_in_a_report(tmp_path: Path) -> None:
    finding = explain.main(tmp_path, num_steps=2, num_draws=32, num_texts=60, max_new_tokens=4, num_runs=2)
    assert finding.numbers["largest error of the exact sum (nats)"] < 1e-9
    assert finding.report.read_text(encoding="utf-8").count("<figure>") == 7
    assert is_short(finding)
    tokens = explain.token_sentiments(bk.TorchLM.from_pretrained("austen"))
    assert 0 < (tokens != 0).mean() < 0.1
