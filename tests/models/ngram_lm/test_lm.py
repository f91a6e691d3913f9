"""`NgramLM` against enumeration, against Witten-Bell values computed by hand, and against its own dense table."""

from itertools import product
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.problems import gold_table


def random_table(vocab_size: int, order: int, seed: int = 0) -> np.ndarray:
    """Log-probs of random rows, shape (V,) * order."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(vocab_size), size=(vocab_size,) * (order - 1))
    return np.log(probs).reshape((vocab_size,) * order)


def completions(vocab_size: int, eos: set[int], num_tokens: int) -> list[list[int]]:
    """Every completion once: up to and including the first EOS, or cut at `num_tokens`."""
    rows = product(range(vocab_size), repeat=num_tokens)
    first = [next((t + 1 for t, a in enumerate(x) if a in eos), num_tokens) for x in rows]
    rows = product(range(vocab_size), repeat=num_tokens)
    return [list(x) for x in sorted({x[:length] for x, length in zip(rows, first, strict=True)})]


def as_sequences(xs: list[list[int]], num_tokens: int, pad: int) -> bk.Sequences:
    return bk.Sequences.from_lists(xs, max_new_tokens=num_tokens, pad_token=pad)


def by_decoding(lm: bk.NgramLM, prompt: list[int], x: list[int]) -> list[float]:
    """Log-probs of a completion's tokens, one `append` after the other."""
    state, log_probs = lm.prefill([prompt]), []
    for token in x:
        log_probs.append(float(lm.next_log_probs(state)[0, token]))
        state = lm.append(state, np.array([token]))
    return log_probs


def models() -> dict[str, bk.NgramLM]:
    """One model of every kind, with the vocabularies small enough to enumerate."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 3, size=9).tolist() for _ in range(4)]
    return {
        "order 1": bk.NgramLM(random_table(3, 1), eos_token_id=2),
        "order 2": bk.NgramLM(gold_table(-0.5), eos_token_id=3),
        "order 3": bk.NgramLM(random_table(3, 3), eos_token_id=0),
        "order 4": bk.NgramLM(random_table(3, 4), eos_token_id=1),
        "two EOS": bk.NgramLM(random_table(4, 3), eos_token_id={3, 1}),
        "no EOS": bk.NgramLM(random_table(3, 3), eos_token_id=None),
        "fitted texts": bk.NgramLM.fit(["abab", "b", ""], order=3),
        "fitted ids, order 1": bk.NgramLM.fit(ids, order=1, eos_token_id=3, vocab_size=4),
        "fitted ids, order 4": bk.NgramLM.fit(ids, order=4, eos_token_id=2),
        "fitted ids, no EOS": bk.NgramLM.fit(ids, order=3, vocab_size=4),
    }


@pytest.fixture(params=models())
def lm(request: pytest.FixtureRequest) -> bk.NgramLM:
    return models()[request.param]


# --- the distribution over completions ---------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_all_completions_together_have_mass_one(lm: bk.NgramLM, num_tokens: int) -> None:
    xs = completions(lm.vocab_size, set(lm.eos_token_ids), num_tokens)
    sequences = as_sequences(xs, num_tokens, pad=0)
    prompts = [[], [1], [1, 0, 1, 2, 0]]
    three = bk.Sequences(np.repeat(sequences.tokens, 3, axis=0), np.repeat(sequences.lengths, 3, axis=0))
    log_probs = lm.token_log_probs(prompts, three)
    assert log_probs.dtype == np.float64
    assert log_probs.shape == (3, len(xs), num_tokens)
    np.testing.assert_allclose(np.exp(log_probs.sum(axis=2)).sum(axis=1), 1, rtol=0, atol=1e-12)


def test_scoring_and_decoding_are_the_same_numbers(lm: bk.NgramLM) -> None:
    for prompt in ([], [0], [2, 1, 0, 2]):
        for x in completions(lm.vocab_size, set(lm.eos_token_ids), 3)[::5]:
            scored = lm.token_log_probs([prompt], as_sequences([x], 3, pad=0))[0, 0]
            np.testing.assert_allclose(scored[: len(x)], by_decoding(lm, prompt, x), rtol=1e-13)
            assert (scored[len(x) :] == 0).all()


def test_a_prompt_and_its_completion_are_one_string(lm: bk.NgramLM) -> None:
    whole = lm.token_log_probs([[]], as_sequences([[0, 1, 2, 1, 0]], 5, pad=0))[0, 0]
    for cut in range(1, 5):
        rest = as_sequences([[0, 1, 2, 1, 0][cut:]], 5, pad=0)
        scored = lm.token_log_probs([[0, 1, 2, 1, 0][:cut]], rest)[0, 0]
        np.testing.assert_array_equal(scored[: 5 - cut], whole[cut:])


def test_the_table_is_read_with_the_oldest_token_first() -> None:
    table = random_table(3, 3)
    lm = bk.NgramLM(table, eos_token_id=2)
    np.testing.assert_array_equal(lm.next_log_probs(lm.prefill([[0, 1]]))[0], table[0, 1])
    np.testing.assert_array_equal(lm.next_log_probs(lm.prefill([[0, 2, 1, 0]]))[0], table[1, 0])
    scored = lm.token_log_probs([[0]], as_sequences([[1, 0]], 2, pad=2))[0, 0]
    np.testing.assert_array_equal(scored, [table[2, 0, 1], table[0, 1, 0]])


@pytest.mark.parametrize("eos, pad", [(2, 2), ({3, 1}, 1), (None, 0), ([3], 3)])
def test_what_stands_before_the_start(eos: Any, pad: int) -> None:
    table = random_table(4, 3)
    lm = bk.NgramLM(table, eos_token_id=eos)
    assert lm.accepts_empty_prompt
    assert lm.eos_token_ids == ({eos} if isinstance(eos, int) else set(eos or ()))
    np.testing.assert_array_equal(lm.next_log_probs(lm.prefill([[], [0]])), [table[pad, pad], table[pad, 0]])


def test_what_stands_past_the_length_is_ignored() -> None:
    lm = models()["order 3"]
    tokens, lengths = np.array([[[1, 0, 2, 2], [2, 2, 1, 0]]]), np.array([[2, 4]])
    clean = lm.token_log_probs([[]], bk.Sequences(tokens, lengths))
    dirty = tokens.copy()
    dirty[0, 0, 2:] = (-100, 77)
    np.testing.assert_array_equal(lm.token_log_probs([[]], bk.Sequences(dirty, lengths)), clean)
    assert (clean[0, 0, :2] != 0).all()  # EOS, the last token, is scored
    assert (clean[0, 0, 2:] == 0).all()


def test_states_are_values() -> None:
    lm = models()["order 4"]
    state = lm.prefill([[0, 1], [2], []])
    before = lm.next_log_probs(state).copy()
    later = lm.append(state, np.array([1, 2, 0]))
    chosen = lm.select(state, np.array([2, 0, 0, 1]))
    lm.next_log_probs(later)[:] = 0.0
    lm.next_log_probs(chosen)[:] = 0.0
    lm.append(chosen, np.array([0, 0, 0, 0]))
    np.testing.assert_array_equal(lm.next_log_probs(state), before)
    np.testing.assert_array_equal(lm.next_log_probs(chosen), before[[2, 0, 0, 1]])
    assert lm.next_log_probs(lm.select(state, np.array([], dtype=np.int64))).shape == (0, 3)


# --- dense tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, message",
    [
        (np.log(np.full((2, 3), 1 / 3)), r"shape \(V,\) \* order.*\(2, 3\)"),
        (0.0, r"shape \(V,\) \* order.*\(\)"),
        (np.zeros((0, 0)), r"shape \(V,\) \* order.*\(0, 0\)"),
        ([[np.log(0.5)] * 2, [np.nan, 0.0]], r"NaN; row \(1,\)"),
        ([[0.5, 0.5], [0.25, 0.75]], r"at most 0; entry \(0, 0\) is 0.5"),
        (np.log([[0.5, 0.5], [0.5, 0.4]]), r"row \(1,\) sum to 0.9\b"),
        (np.log([[0.5, 0.5], [0.5, 0.50001]]), r"row \(1,\) sum to 1.00001"),
        ([[0.0, -np.inf], [-np.inf, -np.inf]], r"row \(1,\) sum to 0\b"),
    ],
)
def test_what_is_no_table_of_log_probs_is_refused(table: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.NgramLM(table, eos_token_id=None)


def test_rounding_of_float32_is_repaired_and_exact_rows_are_kept() -> None:
    exact = random_table(5, 3)
    rounded = exact.astype(np.float32)
    assert np.abs(np.exp(rounded.astype(np.float64)).sum(axis=-1) - 1).max() > 1e-9
    repaired = bk.NgramLM(rounded, eos_token_id=0).log_probs
    np.testing.assert_allclose(np.exp(repaired).sum(axis=-1), 1, rtol=0, atol=1e-14)
    np.testing.assert_allclose(repaired, exact, atol=1e-6)
    np.testing.assert_array_equal(bk.NgramLM(exact, eos_token_id=0).log_probs, exact)


def test_the_callers_array_is_neither_written_nor_followed() -> None:
    table = random_table(3, 2)
    given_copy = table.copy()
    lm = bk.NgramLM(table, eos_token_id=0)
    np.testing.assert_array_equal(table, given_copy)
    table[:] = np.log(1 / 3)
    np.testing.assert_array_equal(lm.log_probs, given_copy)
    with pytest.raises(ValueError, match="read-only"):
        lm.log_probs[0, 0] = 0.0


def test_probability_zero_is_legal_and_told() -> None:
    with np.errstate(divide="ignore"):
        lm = bk.NgramLM(np.log([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), eos_token_id=2)
    assert not lm.full_support
    assert bk.NgramLM(gold_table(0.0), eos_token_id=3).full_support
    scored = lm.token_log_probs([[]], as_sequences([[0, 2], [0, 1]], 3, pad=2))[0]
    np.testing.assert_array_equal(scored, [[0.0, -np.inf, 0.0], [0.0, np.log(0.5), 0.0]])
    mass = np.exp(lm.token_log_probs([[]], as_sequences(completions(3, {2}, 4), 4, pad=2)).sum(axis=2))
    assert mass.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("eos", [3, -1, {0, 5}])
def test_an_eos_outside_the_vocabulary_is_refused(eos: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"EOS id (3|-1|5) is outside the vocabulary 0..2"):
        bk.NgramLM(random_table(3, 2), eos_token_id=eos)


@pytest.mark.parametrize("token", [-1, 3])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    for lm in (models()["order 3"], models()["fitted texts"]):
        message = rf"Token id {token} is outside the vocabulary 0\.\.2"
        with pytest.raises(bk.BayesKLRLError, match=message):
            lm.prefill([[0], [token, 1, 1, 1]])
        with pytest.raises(bk.BayesKLRLError, match=message):
            lm.append(lm.prefill([[0]]), np.array([token]))
        with pytest.raises(bk.BayesKLRLError, match=message):
            lm.token_log_probs([[]], as_sequences([[1, token]], 2, pad=0))
    with pytest.raises(bk.BayesKLRLError, match=r"list of integers.*float64"):
        lm.prefill([[0.0, 1.0]])


def test_one_prompt_for_each_row_of_completions() -> None:
    with pytest.raises(bk.BayesKLRLError, match="2 prompts and completions for 1"):
        models()["order 3"].token_log_probs([[], []], as_sequences([[1]], 2, pad=0))
