"""The posterior's densities against sums by hand, and what it takes for a completion."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.user_models import RecurrentLM, TextLM

EOS = 2
PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1]])  # p(next | previous), EOS before the start
LM = bk.NgramLM(np.log(PROBS), eos_token_id=EOS)
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=2.0)


def posterior(prior: Any = LM, likelihood: bk.Likelihood = LONGER, **options: Any) -> bk.Posterior:
    return bk.Posterior(prior, likelihood, **{"max_new_tokens": 3} | options)


@pytest.mark.parametrize(
    "prompt, x, prior",
    [
        ([], [2], 0.1),
        ([], [0, 2], 0.7 * 0.2),
        ([], [0, 1, 2], 0.7 * 0.3 * 0.3),
        ([], [1, 1, 1], 0.2 * 0.6 * 0.6),
        ([2, 1], [1, 2], 0.6 * 0.3),
        ([0, 0, 0], [2], 0.2),
    ],
)
def test_densities_are_products_of_next_token_probabilities(prompt: list, x: list, prior: float) -> None:
    one = posterior(prompts=[prompt])
    for values, expected in [
        (one.log_prior([x]), np.log(prior)),
        (one.reward([x]), len(x)),
        (one.log_likelihood([x]), len(x) / 2),
        (one.log_joint([x]), np.log(prior) + len(x) / 2),
    ]:
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, [[expected]], rtol=1e-12)


def test_several_prompts_of_different_length_each_have_their_own_completions() -> None:
    prompts, xs = [[0, 1], [], [0]], [[[2], [0, 1, 1]], [[1, 2], [2]], [[0, 0, 0], [1, 1, 2]]]
    tokens = np.full((3, 2, 3), EOS)
    for p, row in enumerate(xs):
        for n, x in enumerate(row):
            tokens[p, n, : len(x)] = x
    lengths = np.array([[len(x) for x in row] for row in xs])
    joint = posterior(prompts=prompts).log_joint(bk.Sequences(tokens, lengths))
    one_by_one = [posterior(prompts=[prompt]).log_joint(row)[0] for prompt, row in zip(prompts, xs, strict=True)]
    np.testing.assert_allclose(joint, one_by_one, rtol=1e-12)


def test_lists_sequences_draws_and_any_padding_are_the_same_completions() -> None:
    one = posterior()
    draws = bk.ImportanceSampling(50).run(one, seed=0)
    expected = one.log_joint(draws.sequences.lists())
    wide = draws.sequences.padded(9, -1)
    for x in (draws, draws.sequences, wide, bk.Sequences(wide.tokens.astype(np.int32), wide.lengths)):
        np.testing.assert_array_equal(one.log_joint(x), expected)


def test_no_completions_have_no_densities() -> None:
    assert posterior().log_joint([]).shape == (1, 0)


def test_scoring_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    two = posterior(prompts=[[0], [1]])
    draws = bk.ImportanceSampling(101).run(two, seed=0)
    whole = two.log_prior(draws)
    monkeypatch.setattr("bayes_klrl.sequences._TOKENS_PER_CHUNK", 60)
    np.testing.assert_array_equal(completion_log_probs(LM, two.prompt_ids, draws.sequences), whole)


def test_impossible_is_minus_infinity_and_not_nan() -> None:
    with np.errstate(divide="ignore"):
        lm = bk.NgramLM(np.log([[0.5, 0.0, 0.5]] * 3), eos_token_id=EOS)
    banned = bk.TokenReward(lambda tokens, lengths: np.where(tokens[:, 0] < 2, -np.inf, 0.0), alpha=1.0)
    one = posterior(lm, banned)
    np.testing.assert_array_equal(one.log_prior([[1, 2], [2]]), [[-np.inf, np.log(0.5)]])
    np.testing.assert_array_equal(one.log_joint([[1, 2], [0, 2], [2]]), [[-np.inf, -np.inf, np.log(0.5)]])


@pytest.mark.parametrize(
    "x, says",
    [
        ([[0, 2], [0]], r"Completion 1 of prompt 0 is a prefix, not an outcome: \[0\]"),
        ([[0, 2, 2]], "Completion 0 of prompt 0 goes on after EOS"),
        ([[2, 0]], "goes on after EOS"),
        ([[0, 3, 2]], r"Token id 3 is outside the vocabulary 0\.\.2"),
        ([[-1, 2]], "Token id -1 is outside"),
        ([[0, 0, 0, 2]], "Completion 0 has 4 tokens"),
        ([[]], "Completion 0 has 0 tokens"),
        ([0, 2], "must be a list of token ids"),
        (bk.Sequences(np.zeros((2, 1, 3), int), np.full((2, 1), 3)), "of 2 prompts, the posterior has 1"),
        (bk.Sequences(np.zeros((1, 1, 4), int), np.full((1, 1), 4)), "4 tokens does not fit"),
        (bk.Sequences(np.zeros((1, 1, 2), int), np.full((1, 1), 2)), "prefix"),
    ],
)
@pytest.mark.parametrize("method", ["log_prior", "reward", "log_likelihood", "log_joint"])
def test_what_is_no_outcome_has_no_density(method: str, x: Any, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=says):
        getattr(posterior(), method)(x)


def test_lists_are_for_one_prompt() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"has 2\. Give bk\.Sequences"):
        posterior(prompts=[[0], [1]]).log_joint([[2]])


# ---- prompts


@pytest.mark.parametrize(
    "prompts, prompt_ids",
    [
        ("12", ((1, 2),)),
        (["12", "", "0"], ((1, 2), (), (0,))),
        ([1, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        ([[1, 2], []], ((1, 2), ())),
        (([1], (2,)), ((1,), (2,))),
        (np.array([1, 2]), ((1, 2),)),
        (np.array([[1, 2], [0, 1]]), ((1, 2), (0, 1))),
        ([[np.int64(1)], np.array([2, 0])], ((1,), (2, 0))),
    ],
)
def test_prompts_are_texts_or_ids_one_or_several(prompts: Any, prompt_ids: tuple) -> None:
    class WithoutStart(TextLM):
        accepts_empty_prompt = True

    made = posterior(WithoutStart(), prompts=prompts)
    assert made.prompt_ids == prompt_ids
    assert all(type(i) is int for ids in made.prompt_ids for i in ids)
    assert made.num_prompts == len(made.prompts) == len(prompt_ids)


@pytest.mark.parametrize("prompts", ["", [""], [[]]])
def test_an_empty_prompt_is_the_models_bos(prompts: Any) -> None:
    class WithBOS(TextLM):
        bos_token_id = 1

    lm = WithBOS()
    empty, spelled_out = posterior(lm, prompts=prompts), posterior(lm, prompts=[1])
    assert empty.prompt_ids == ((1,),)
    np.testing.assert_array_equal(empty.log_prior([[0, 3]]), spelled_out.log_prior([[0, 3]]))


def test_bos_is_not_added_to_a_prompt_that_is_not_empty() -> None:
    class WithBOS(TextLM):
        bos_token_id = 1

    assert posterior(WithBOS(), prompts=["", "2"]).prompt_ids == ((1,), (2,))


@pytest.mark.parametrize("num_prompt_tokens, max_new_tokens, fits", [(5, 3, True), (6, 3, False), (0, 8, False)])
def test_prompt_and_completion_fit_into_the_context(num_prompt_tokens: int, max_new_tokens: int, fits: bool) -> None:
    class Short(RecurrentLM):
        context_length = 8
        bos_token_id = 0

    lm = Short()
    make: Callable[[], Any] = lambda: posterior(  # noqa: E731
        lm, prompts=[[1], [1] * num_prompt_tokens], max_new_tokens=max_new_tokens
    )
    if fits:
        make()
    else:
        with pytest.raises(bk.BayesKLRLError, match="exceed the model's context of 8"):
            make()
    assert lm.num_calls == 0


# ---- columns


@pytest.mark.parametrize("name", ["completions", "completion_ids", "finished", "tokens", "lengths", "prompt_index"])
def test_reserved_names_are_no_columns(name: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=f"'{name}': the name is reserved"):
        posterior(**{name: [1]})


@pytest.mark.parametrize("values", [[1], [1, 2, 3], "ab", 7, None])
def test_a_column_has_one_value_a_prompt(values: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="'weight' needs one value per prompt, a list of length 2"):
        posterior(prompts=[[0], [1]], weight=values)


def test_columns_may_be_arrays() -> None:
    made = posterior(prompts=[[0], [1]], weight=np.array([1.5, 2.5]))
    assert made.columns == {"weight": (1.5, 2.5)}


def test_repr_says_what_is_conditioned_on_what() -> None:
    text = repr(posterior(likelihood=bk.Reward(lambda completion_ids: [], alpha=0.5, name="fun")))
    assert all(part in text for part in ("NgramLM", "fun", "0.5", "max_new_tokens=3"))
