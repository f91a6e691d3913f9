"""`HmmLM` against sums over hidden paths."""

from itertools import product

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from tests.helpers.automata import random_hmm
from tests.helpers.truth import completions


def path_sum(lm: bk.HmmLM, tokens: list[int]) -> float:
    """p(tokens) by enumeration of hidden paths."""
    total = 0.0
    for path in product(range(lm.num_hidden), repeat=len(tokens)):
        prob = lm.initial[path[0]] if path else 1.0
        for t, (z, a) in enumerate(zip(path, tokens, strict=True)):
            prob *= lm.emissions[z, a] * (lm.transitions[path[t - 1], z] if t else 1.0)
        total += prob
    return total


@pytest.mark.parametrize("eos", [(3,), (), (0, 2)])
@pytest.mark.parametrize("prompt", [[], [1], [1, 0, 1]])
def test_scores_are_sums_over_paths(eos: tuple[int, ...], prompt: list[int]) -> None:
    lm = random_hmm(np.random.default_rng(1), 3, 4, eos)
    xs = completions(4, eos, 3)
    sequences = bk.Sequences.from_lists(xs, max_new_tokens=3)
    log_probs = lm.token_log_probs([prompt], sequences)
    expected = [path_sum(lm, prompt + x) / path_sum(lm, prompt) for x in xs]
    np.testing.assert_allclose(np.exp(log_probs.sum(axis=2))[0], expected, rtol=1e-11, atol=1e-300)
    assert np.exp(log_probs.sum(axis=2)).sum() == pytest.approx(1.0, abs=1e-12)
    assert (log_probs[~sequences.mask] == 0).all()


def test_decoding_and_scoring_are_one() -> None:
    lm = random_hmm(np.random.default_rng(2), 4, 5, (4,))
    drawn = decode((lm,), [[], [0, 1]], 50, 12, np.random.default_rng(0))
    scored = lm.token_log_probs([[], [0, 1]], drawn.sequences()).sum(axis=2)
    np.testing.assert_allclose(scored.ravel(), drawn.log_probs[0], rtol=0, atol=1e-11)


def test_states_are_values() -> None:
    lm = random_hmm(np.random.default_rng(3), 3, 4, ())
    state = lm.prefill([[0], [1]])
    before = state.copy()
    after = lm.append(state, np.array([2, 2]))
    np.testing.assert_array_equal(state, before)
    np.testing.assert_array_equal(lm.select(after, np.array([1, 1, 0])), after[[1, 1, 0]])
    np.testing.assert_allclose(state.sum(axis=1), 1.0)


def test_after_the_impossible_it_is_still_a_distribution() -> None:
    lm = bk.HmmLM([1.0, 0.0], np.eye(2), [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], eos_token_id=None)
    assert not lm.full_support
    state = lm.append(lm.prefill([[]]), np.array([2]))
    assert np.exp(lm.next_log_probs(state)).sum() == pytest.approx(1.0)
    x = bk.Sequences.from_lists([[2, 0], [0, 1]], max_new_tokens=2)
    assert lm.token_log_probs([[]], x).sum(axis=2)[0].tolist() == pytest.approx([-np.inf, 2 * np.log(0.5)])
    with pytest.raises(bk.BayesKLRLError, match="Prompt 0 has probability 0 under this HmmLM, at token 2"):
        lm.prefill([[0, 2]])


def test_protocol_and_refusals() -> None:
    lm = random_hmm(np.random.default_rng(4), 2, 3, (2,))
    assert isinstance(lm, bk.LanguageModel)
    assert (lm.vocab_size, lm.eos_token_ids, lm.tokenizer, lm.encode([""])) == (3, {2}, None, [[]])
    for arguments, complaint in [
        (([0.5, 0.6], np.eye(2), np.ones((2, 1))), "Every row of initial must sum to 1"),
        (([0.5, 0.5], np.eye(3), np.ones((2, 1))), r"transitions must be \(2, 2\)"),
        (([0.5, 0.5], np.eye(2), np.ones((3, 1))), r"emissions \(2, V\)"),
        (([1.5, -0.5], np.eye(2), np.ones((2, 1))), "neither negative"),
        (([[1.0]], np.eye(1), np.ones((1, 1))), "initial must have 1 axes"),
    ]:
        with pytest.raises(bk.BayesKLRLError, match=complaint):
            bk.HmmLM(*arguments, eos_token_id=None)
    with pytest.raises(bk.BayesKLRLError, match="Token id 5 is outside"):
        bk.HmmLM([1.0], [[1.0]], [[1.0]], eos_token_id=5)
    with pytest.raises(bk.BayesKLRLError, match="no tokenizer"):
        lm.encode(["a"])
    with pytest.raises(bk.BayesKLRLError, match="no tokenizer"):
        lm.decode([[0]])


def test_text_goes_through_a_tokenizer() -> None:
    tokenizer = bk.NgramLM.fit(["ab"], order=1).tokenizer
    lm = bk.HmmLM([1.0], [[1.0]], [[0.5, 0.25, 0.25]], eos_token_id=2, tokenizer=tokenizer)
    assert lm.decode(lm.encode(["abba"])) == ["abba"]
    posterior = bk.Posterior(
        lm, bk.Reward(lambda completions: [c.count("b") for c in completions], alpha=1.0), max_new_tokens=3
    )
    assert posterior.reward([[1, 1, 2]]).tolist() == [[2.0]]
