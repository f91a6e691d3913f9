"""A language model that a user writes, and a classifier, need the protocol and nothing more."""

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.algorithms import EVERY_REWARD, named
from tests.helpers.truth import completions
from tests.helpers.user_models import Classifier, RecurrentLM, TextLM

ALGORITHMS = {"Exact, enumerated": bk.Exact()} | named(EVERY_REWARD, 2000)


def classifier_posterior() -> bk.Posterior:
    """Three items, four labels; the reward depends on both."""
    logits = np.random.default_rng(0).normal(size=(3, 4))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    utility = np.random.default_rng(1).normal(size=(3, 4))
    likelihood = bk.TokenReward(lambda tokens, lengths, prompt_index: utility[prompt_index, tokens[:, 0]], alpha=0.7)
    return bk.Posterior(Classifier(log_probs), likelihood, prompts=[[0], [1], [2]], max_new_tokens=1)


POSTERIORS = {
    "recurrent": bk.Posterior(
        RecurrentLM(),
        bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) - lengths, alpha=0.8),
        prompts=[[0, 1], [2]],
        max_new_tokens=4,
    ),
    "recurrent, no EOS": bk.Posterior(
        RecurrentLM(eos_token_ids=()),
        bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=0.8),
        prompts=[[2], [0, 1]],
        max_new_tokens=3,
    ),
    "recurrent, on text": bk.Posterior(
        TextLM(),
        bk.Reward(lambda completions: [text.count("1") for text in completions], alpha=0.8),
        prompts=["2", "01"],
        max_new_tokens=3,
    ),
    "classifier": classifier_posterior(),
}


def truth(posterior: bk.Posterior) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Return the completions, their log-prior by single steps and their rewards, (P, M)."""
    lm = posterior.prior
    xs = completions(lm.vocab_size, sorted(lm.eos_token_ids), posterior.max_new_tokens)
    log_prior = np.zeros((posterior.num_prompts, len(xs)))
    for p, prompt in enumerate(posterior.prompt_ids):
        for m, x in enumerate(xs):
            state = lm.prefill([prompt])
            for t, token in enumerate(x):
                log_prior[p, m] += lm.next_log_probs(state)[0, token]
                if t + 1 < len(x):
                    state = lm.append(state, np.array([token]))
    one = bk.Sequences.from_lists(xs, max_new_tokens=posterior.max_new_tokens, pad_token=posterior.pad_token)
    copies = posterior.num_prompts
    reward = posterior.reward(bk.Sequences(np.repeat(one.tokens, copies, 0), np.repeat(one.lengths, copies, 0)))
    return xs, log_prior, reward


@pytest.fixture(scope="module", params=POSTERIORS)
def case(request: pytest.FixtureRequest) -> tuple[bk.Posterior, Any]:
    return POSTERIORS[request.param], truth(POSTERIORS[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_answer_a_users_model(case: tuple[bk.Posterior, Any], name: str) -> None:
    posterior, (xs, log_prior, reward) = case
    log_joint = log_prior + reward / posterior.alpha
    log_evidence = np.log(np.exp(log_joint).sum(axis=1))
    np.testing.assert_allclose(np.exp(log_prior).sum(axis=1), 1, atol=1e-12)

    draws = ALGORITHMS[name].run(posterior, seed=0)
    index = {tuple(x): m for m, x in enumerate(xs)}
    for p, rows in enumerate(np.array_split(np.array(draws.sequences.lists(), dtype=object), posterior.num_prompts)):
        drawn = [index[tuple(x)] for x in rows]
        np.testing.assert_allclose(draws.log_prior[p], log_prior[p, drawn], atol=1e-12)
        np.testing.assert_array_equal(draws.reward[p], reward[p, drawn])
    if name == "BestOfN":
        assert (draws.reward.mean(axis=1) > (np.exp(log_prior) * reward).sum(axis=1)).all()
        return
    if not np.isnan(draws.log_evidence).any():
        assert (np.abs(draws.log_evidence - log_evidence) <= 4 * draws.log_evidence_se + 1e-12).all()
        assert (draws.log_evidence_se < 0.1).all()
    posterior_mean = (np.exp(log_joint - log_evidence[:, None]) * reward).sum(axis=1)
    np.testing.assert_allclose(
        draws.mean(draws.reward), posterior_mean, atol=1e-12 if name == "Exact, enumerated" else 0.15
    )


def test_best_of_n_labels_have_the_order_statistics_law() -> None:
    posterior = POSTERIORS["classifier"]
    _, log_prior, reward = truth(posterior)
    draws = bk.BestOfN(3, 4000).run(posterior, seed=0)
    for p in range(3):
        prior = np.exp(log_prior[p])
        up_to = np.array([prior[reward[p] <= r].sum() for r in reward[p]])
        law = up_to**3 - (up_to - prior) ** 3  # rewards of different labels differ
        seen = np.bincount(draws.tokens[p, :, 0], minlength=4)
        z = (seen - 4000 * law) / np.sqrt(4000 * law * (1 - law))
        assert np.abs(z).max() < 4


def test_a_users_model_keeps_the_contract() -> None:
    for posterior in POSTERIORS.values():
        bk.check_posterior(posterior).raise_if_broken()
