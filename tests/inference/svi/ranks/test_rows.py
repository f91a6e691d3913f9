"""Completions that ranks draw and score together are those of one process, and so is the sum of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.estimators import leave_one_out
from bayes_klrl.inference.svi.pyro_backend.over_ranks.rows import SharedLM, SharedPosterior
from bayes_klrl.inference.svi.ranks.group import Ranks
from bayes_klrl.inference.svi.ranks.start import check_can_share, check_same_training
from bayes_klrl.models.decoding import check_shares_vocabulary, decode_by
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import full_table
from tests.inference.svi.ranks.threads import on_ranks

COIN = bk.NgramLM(np.log([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]]), eos_token_id=2)
PROMPTS = [[0], [1]]
SIZES = [2, 3, 5]


def completions(num_draws: int = 7, num_tokens: int = 4) -> bk.Sequences:
    uniforms = np.random.default_rng(0).random((num_tokens, 2 * num_draws))
    decoded = decode_by((COIN,), PROMPTS, uniforms)
    return bk.Sequences(decoded.tokens.reshape(2, num_draws, -1), decoded.lengths.reshape(2, num_draws))


class Counting:
    """A reward that counts the completions of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.calls.append(len(tokens))
        return (tokens == 1).sum(axis=1) * 1.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_draws", [1, 2, 7])  # one completion on several ranks, too
def test_draws_and_scores_are_those_of_one_process(size: int, num_draws: int) -> None:
    uniforms = np.random.default_rng(1).random((4, 2 * num_draws))
    sequences, guide = completions(num_draws), TableLM(COIN)
    whole = decode_by((guide,), PROMPTS, uniforms).tokens

    def work(ranks: Ranks) -> Any:
        shared = SharedLM(guide, ranks)
        scores = [getattr(shared, name)(PROMPTS, sequences) for name in ("token_log_probs", "position_log_probs")]
        check_shares_vocabulary("It", shared, COIN)
        return shared.drawn_tokens(PROMPTS, uniforms), *scores

    for tokens, scores, table in on_ranks(size, work):
        np.testing.assert_array_equal(tokens, whole)
        torch.testing.assert_close(scores, guide.token_log_probs(PROMPTS, sequences), rtol=0, atol=1e-14)
        torch.testing.assert_close(table, guide.position_log_probs(PROMPTS, sequences), rtol=0, atol=1e-14)
        assert (scores.requires_grad, table.requires_grad) == (True, True)  # also on a rank without a completion


def surrogate(lm: Any, baseline: Any, rows: slice = slice(None)) -> torch.Tensor:
    """Return the leave-one-out surrogate of completions, with the reward as log w."""
    sequences = completions()
    own = bk.Sequences(sequences.tokens[:, rows], sequences.lengths[:, rows])
    reward = torch.as_tensor((own.tokens == 1).sum(axis=2), dtype=torch.float64)
    log_q = torch.as_tensor(lm.token_log_probs(PROMPTS, own)).sum(dim=2)
    return (baseline((reward - log_q.detach()).T).T * log_q).sum()


@pytest.mark.parametrize("size", SIZES)
def test_the_baseline_is_of_all_completions_of_a_prompt(size: int) -> None:
    """It would not be if each rank took the mean of its own: the gradient is then another one."""
    guide = TableLM(COIN)
    (expected,) = torch.autograd.grad(surrogate(guide, leave_one_out), [guide.logits])

    def work(ranks: Ranks) -> torch.Tensor:
        own = TableLM(COIN)
        surrogate(SharedLM(own, ranks), leave_one_out).backward()
        ranks.sum_gradients([own.logits])
        return own.logits.grad

    def within_the_rank(ranks: Ranks) -> torch.Tensor:
        own = TableLM(COIN)
        surrogate(own, lambda values: values - values.mean(dim=0), ranks.share(7)).backward()
        ranks.sum_gradients([own.logits])
        return own.logits.grad

    for found in on_ranks(size, work):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for wrong in on_ranks(size, within_the_rank):
        assert (wrong - expected).abs().max() > 0.05


@pytest.mark.parametrize("size", SIZES)
def test_every_reward_is_computed_once(size: int) -> None:
    sequences, reward = completions(), Counting()
    whole = bk.Posterior(COIN, bk.TokenReward(reward, alpha=0.7), prompts=PROMPTS, max_new_tokens=4)
    rows = sequences.tokens.reshape(-1, 4), sequences.lengths.ravel(), np.repeat([0, 1], 7)
    expected = whole.reward_of_rows(*rows)
    reward.calls.clear()
    for found in on_ranks(size, lambda ranks: SharedPosterior(whole, ranks).reward_of_rows(*rows)):
        np.testing.assert_array_equal(found, expected)
    assert (sum(reward.calls), len(reward.calls)) == (14, size)


def test_parts_and_other_alphas_of_a_posterior_are_shared_too() -> None:
    whole = bk.Posterior(COIN, bk.TokenReward(Counting(), alpha=0.7), prompts=PROMPTS, max_new_tokens=4)

    def work(ranks: Ranks) -> Any:
        shared = SharedPosterior(whole, ranks)
        parts = shared.select([1]), shared.at_alpha(0.5), shared.split(0.5, seed=0)[0]
        assert all(isinstance(part, SharedPosterior) and part.prior is shared.prior for part in parts)
        assert parts[1].at_alpha(0.7).alpha == 0.7
        return parts[1].log_joint(completions())

    for found in on_ranks(2, work):
        np.testing.assert_allclose(found, whole.at_alpha(0.5).log_joint(completions()), rtol=0, atol=1e-14)


def test_a_reward_that_fails_on_one_rank_is_named_on_all() -> None:
    def fragile(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if (tokens[:, 0] == 2).any():
            raise ValueError("an empty completion")
        return lengths * 1.0

    tokens = np.zeros((4, 3), dtype=np.int64)
    tokens[3, 0] = 2
    whole = bk.Posterior(COIN, bk.TokenReward(fragile, alpha=1.0), prompts=[0], max_new_tokens=3)

    def work(ranks: Ranks) -> str:
        with pytest.raises(bk.BayesKLRLError) as caught:
            SharedPosterior(whole, ranks).reward_of_rows(tokens, np.full(4, 3), np.zeros(4, dtype=np.int64))
        return str(caught.value)

    first, second = on_ranks(2, work)
    assert first.startswith("Rank 1 of 2 raised RewardError")
    assert "an empty completion" in second


@pytest.mark.parametrize(
    "recipe,size,message",
    [
        ({}, 5, r"5 ranks cannot share num_particles=4 .* at most 4 processes"),
        ({"optimizer": "natural"}, 2, 'optimizer="natural" is for one process'),
    ],
)
def test_a_training_that_cannot_be_shared_is_refused(recipe: dict[str, Any], size: int, message: str) -> None:
    check_can_share(bk.SVI(2, 4, **recipe), COIN, Ranks())
    with pytest.raises(bk.BayesKLRLError, match=message):
        check_can_share(bk.SVI(2, 4, **recipe), COIN, Ranks(0, size))


def test_hidden_states_are_refused_where_parameters_are_spread() -> None:
    svi = bk.SVI(2, 4, optimizer="kl_sgd", twist="hidden_states")
    check_can_share(svi, COIN, Ranks(0, 2))
    with pytest.raises(bk.BayesKLRLError, match="hidden_states"):
        check_can_share(svi, COIN, Ranks(0, 2, spreads=True))


def test_a_prior_on_jax_is_refused() -> None:
    pytest.importorskip("jax")
    with pytest.raises(bk.BayesKLRLError, match="JaxTable, on JAX"):
        check_can_share(bk.SVI(2, 4), JaxTable(full_table(COIN, 2)), Ranks(0, 2))


def test_ranks_that_train_something_else_are_refused() -> None:
    here = {"seed": 0, "recipe": {"num_steps": "5"}, "prior": [[-1.0, -2.0]]}

    def work(other: dict[str, Any]) -> Any:
        def on(ranks: Ranks) -> str | None:
            try:
                check_same_training(here if ranks.rank == 0 else {**here, **other}, ranks)
            except bk.BayesKLRLError as error:
                return str(error)
            return None

        return on

    assert on_ranks(2, work({"prior": [[-1.0, -2.0000001]]})) == [None, None]  # rounding of another machine
    for change, words in (
        ({"seed": 1}, "seed: 0 on rank 0, 1 on rank 1"),
        ({"recipe": {"num_steps": "6"}}, "recipe num_steps: 5 on rank 0, 6 on rank 1"),
        ({"prior": [[-1.0, -2.5]]}, "prior:"),
    ):
        found = on_ranks(2, work(change))
        assert all(words in str(each) for each in found), found
