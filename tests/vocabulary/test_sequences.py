"""Completions as arrays: what counts is told by lengths, never by the padding."""

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.sequences import completion_lengths, pad_token


@pytest.mark.parametrize(
    "eos, lengths",
    [({0}, [1, 2, 4, 1]), ({0, 7}, [1, 2, 3, 1]), ({9}, [4, 4, 4, 4]), (set(), [4, 4, 4, 4])],
    ids=["one EOS", "two", "never drawn", "none"],
)
def test_a_completion_goes_up_to_its_first_eos(eos: set[int], lengths: list[int]) -> None:
    tokens = np.array([[0, 1, 2, 3], [5, 0, 0, 1], [5, 5, 7, 0], [0, 0, 0, 0]])
    assert completion_lengths(tokens, eos).tolist() == lengths
    assert completion_lengths(tokens.reshape(2, 2, 4), eos).tolist() == [lengths[:2], lengths[2:]]


@pytest.mark.parametrize("eos, pad", [({5}, 5), ({7, 3, 4}, 3), (set(), 0)])
def test_padding_is_the_lowest_eos_or_0(eos: set[int], pad: int) -> None:
    assert pad_token(eos) == pad


def test_lists_and_arrays_are_each_others_inverse_even_where_pad_is_eos() -> None:
    completions = [[1, 0], [0], [0, 0, 0], [2, 2, 2]]
    for pad in (0, 2, 9):
        xs = bk.Sequences.from_lists(completions, max_new_tokens=3, pad_token=pad)
        assert xs.lists() == completions
        assert xs.tokens[0, 1].tolist() == [0, pad, pad]
        assert xs.mask.sum(axis=2).tolist() == [[2, 1, 3, 3]]


def test_lists_go_prompt_by_prompt() -> None:
    xs = bk.Sequences(np.arange(12).reshape(2, 3, 2), np.array([[1, 2, 1], [2, 1, 2]]))
    assert xs.lists() == [[0], [2, 3], [4], [6, 7], [8], [10, 11]]


def test_finished_reads_the_last_token_of_a_completion_and_not_its_padding() -> None:
    xs = bk.Sequences.from_lists([[1, 0], [1, 1], [0, 1], [1, 1, 1]], max_new_tokens=3, pad_token=0)
    assert xs.finished({0}).tolist() == [[True, False, False, False]]
    assert xs.finished({0, 1}).all()
    assert not xs.finished(set()).any()


@pytest.mark.parametrize("width", [2, 3, 5])
def test_padded_changes_nothing_but_what_stands_past_the_length(width: int) -> None:
    xs = bk.Sequences(np.array([[[1, 0, -1], [2, 1, -1]]]), np.array([[1, 2]]))
    padded = xs.padded(width, 7)
    assert padded.lists() == xs.lists() == [[1], [2, 1]]
    assert padded.tokens.shape == (1, 2, width)
    assert (padded.tokens[~padded.mask] == 7).all()
    assert xs.tokens[0, 0].tolist() == [1, 0, -1]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_integers_of_any_width_become_int64(dtype: type) -> None:
    xs = bk.Sequences(np.ones((1, 2, 3), dtype), np.ones((1, 2), dtype))
    assert xs.tokens.dtype == xs.lengths.dtype == np.int64


@pytest.mark.parametrize(
    "rows", [[np.array([1, 2]), (3,)], [[np.int32(1), np.int64(2)], [3]]], ids=["arrays", "scalars"]
)
def test_lists_may_hold_numpy_integers(rows: list) -> None:
    assert bk.Sequences.from_lists(rows, max_new_tokens=2).lists() == [[1, 2], [3]]


@pytest.mark.parametrize(
    "tokens, lengths, says",
    [
        (np.ones((2, 3), int), np.ones((2, 3), int), r"\(P, N, T\)"),
        (np.ones((1, 2, 3), int), np.ones((2, 1), int), r"\(P, N, T\)"),
        (np.ones((1, 2, 3)), np.ones((1, 2), int), "integers"),
        (np.ones((1, 2, 3), int), np.ones((1, 2)), "integers"),
        (np.ones((1, 2, 3), int), np.array([[1, 4]]), "from 1 to 4"),
        (np.ones((1, 2, 3), int), np.array([[0, 1]]), "from 0 to 1"),
    ],
)
def test_arrays_that_are_no_completions_are_refused(tokens: np.ndarray, lengths: np.ndarray, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=says):
        bk.Sequences(tokens, lengths)


@pytest.mark.parametrize(
    "rows, says",
    [
        ([[1], []], "Completion 1 has 0 tokens"),
        ([[1], [1, 2, 3]], "Completion 1 has 3 tokens"),
        ([1, 2], "Completion 0 must be a list of token ids; got 1"),
        (["ab"], "Completion 0 must be a list of token ids; got 'ab'"),
        ([[1], [1.5]], "Completion 1 must be a list of token ids"),
        ([[[1], [1, 2]]], "Completion 0 must be a list of token ids"),
    ],
)
def test_lists_that_are_no_completions_are_refused(rows: list, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=says):
        bk.Sequences.from_lists(rows, max_new_tokens=2)


def test_too_long_a_completion_is_not_cut_in_silence() -> None:
    with pytest.raises(bk.BayesKLRLError, match="3 tokens does not fit"):
        bk.Sequences.from_lists([[1, 1, 1]], max_new_tokens=3).padded(2, 0)
