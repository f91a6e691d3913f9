"""Data and features that reward models learn from, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.reward_models.features import FeatureMap, as_features
from bayes_klrl.reward_models.preferences import training_batch
from tests.reward_models.test_posterior import TOKENS, counts, simulated

LETTERS = bk.NgramLM.fit(["ab", "ba", "aab", "b", "abba"], order=2)


# Data


def test_rows_of_trl_are_read() -> None:
    rows = [
        {"prompt": "p", "chosen": "ab", "rejected": "b", "source": 1},
        {"prompt": "q", "chosen": "a", "rejected": "ba", "source": 2},
    ]
    data = bk.Preferences.from_rows(iter(rows))
    assert (data.prompts, data.chosen, data.rejected) == (("p", "q"), ("ab", "a"), ("b", "ba"))
    assert data.columns == {"source": (1, 2)}
    batch = data.batch(LETTERS)
    assert batch.completions == ["ab", "a", "b", "ba"]
    assert batch.named("source") == [1, 2, 1, 2]
    assert batch.named("prompts") == ["p", "q", "p", "q"]
    assert batch.completion_ids == [[*LETTERS.encode([text])[0], *LETTERS.eos_token_ids] for text in batch.completions]
    with pytest.raises(bk.BayesKLRLError, match=r"Row 1 has no \['rejected'\]"):
        bk.Preferences.from_rows([rows[0], {"prompt": "q", "chosen": "a"}])
    message = [{"role": "assistant", "content": "ab"}]
    assert bk.Preferences.from_rows([{"prompt": "p", "chosen": message, "rejected": "b"}]).chosen == ("ab",)


def test_the_bos_that_a_tokenizer_adds_is_not_the_completion() -> None:
    class WithBos:
        bos_token_id = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(LETTERS, name)

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[0, *ids] for ids in LETTERS.encode(texts)]

    plain, other = PAIRS.batch(LETTERS), PAIRS.batch(WithBos())
    assert plain.completion_ids == other.completion_ids


def test_labels_say_who_won() -> None:
    data = bk.Preferences.labelled("", ["a", "ab"], ["b", "ba"], [1, 0])
    assert (data.chosen, data.rejected) == (("a", "ba"), ("b", "ab"))
    with pytest.raises(bk.BayesKLRLError, match=r"Label 1 is 0\.5: a tie"):
        bk.Preferences.labelled("", ["a", "ab"], ["b", "ba"], [1, 0.5])
    with pytest.raises(bk.BayesKLRLError, match="Label 0 is nan: neither"):
        bk.Preferences.labelled("", ["a", "ab"], ["b", "ba"], [np.nan, 0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("", [], []), "set of preferences is empty"),
        (("", ["a", "b"], ["c"]), "2 chosen completions and 1 rejected"),
        ((["p"], ["a", "b"], ["b", "a"]), "list of 2"),
        (("", ["a", "b"], ["b", "b"]), r"Pair 1 is a tie: 'b'"),
        (("", ["a", [1, 2]], ["b", "a"]), "all texts or all token ids; number 1"),
        (("", ["a", 3], ["b", "a"]), r"chosen\[1\] must be a text"),
        (("", "ab", ["b", "a"]), "chosen is a list"),
        (("", [[1], []], [[2], [3]]), r"chosen\[1\] must be a text or a non-empty list"),
        ((["p", 3.5], ["a", "b"], ["b", "a"]), r"prompts\["),
        (("", ["a", "b"], ["b", "a"], {"prompts": [1, 2]}), "reserved"),
        (("", ["a", "b"], ["b", "a"], {"source": [1]}), "one value per row, 2"),
    ],
)
def test_bad_preferences(arguments: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.Preferences(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("", [], []), "set of scores is empty"),
        (("", ["a", "b"], [1.0]), "2 completions and 1 scores"),
        (("", ["a", "b"], [1.0, np.nan]), "Score 1 is nan"),
        (("", ["a", "b"], [1.0, np.inf]), "Score 1 is inf"),
        (("", ["a", "b"], [1.0, "good"]), r"scores\[1\] must be a number; got 'good'"),
        (("", ["a", "b"], [2.0, 2.0]), "All scores are 2.0"),
        (("", ["a", "b"], [1.0, 2.0], 0.0), "noise is a positive"),
        (("", ["a", "b"], [1.0, 2.0], [0.1, 0.2, 0.3]), "noise is a positive"),
    ],
)
def test_bad_scores(arguments: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.Scores(*arguments)


PAIRS = bk.Preferences("", ["ab", "ba", "aab"], ["a", "b", "b"])


def lengths_of(completions: list[str]) -> list[list[float]]:
    return [[len(text), text.count("a")] for text in completions]


@pytest.mark.parametrize(
    "data, features, options, message",
    [
        (
            bk.Preferences("", ["ab", "ab"], ["a", "b"]),
            lengths_of,
            {},
            r"One winner only: 'ab' wins every comparison \(2\)",
        ),
        (PAIRS, lambda completions: [[1.0, 2.0] for _ in completions], {}, "All features are constant"),
        (PAIRS, lambda completions: [[len(c), 2.0] for c in completions], {}, r"features \[1\] are constant"),
        (PAIRS, lambda completions: [[len(c) > 1, c == "?"] for c in completions], {}, r"features \[1\] are constant"),
        (PAIRS, lambda completions: [c.count("b") for c in completions], {}, r"Pair 1 is a tie: .*identical features"),
        (
            PAIRS,
            lambda completions: [float("nan") if c == "b" else 1 for c in completions],
            {},
            "is nan for completion 4 'b'",
        ),
        (
            PAIRS,
            lambda completions: [float("inf") if c == "ba" else 1 for c in completions],
            {},
            "is inf for completion 1 'ba'",
        ),
        (PAIRS, lambda completions: [[1.0] * len(c) for c in completions], {}, "same number of features"),
        (PAIRS, lambda completions: [[1.0, 2.0]], {}, "returned 1 rows for 6 completions"),
        (PAIRS, lambda completions: None, {}, "returned None"),
        (PAIRS, lambda completions, mood: [1.0] * 6, {}, "asks for .*mood"),
        (
            PAIRS,
            lambda completions: [[len(c), 1 / (len(c) - 1)] for c in completions],
            {},
            "ZeroDivisionError.*completion 3 'a'",
        ),
        (PAIRS, lengths_of, {"num_components": 3}, "at most 2"),
        (PAIRS, bk.HiddenStates(), {}, "NgramLM has no hidden states"),
        (PAIRS, bk.TokenFeatures(lambda tokens: tokens), {}, r"must take \(tokens, lengths\)"),
        ("pairs", lengths_of, {}, "bk.Preferences or bk.Scores"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(data: Any, features: Any, options: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.RewardModel(features, **options).fit(LETTERS, data, seed=0)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(bk.TextRewardError, match=r"features .* read text, but the prior has no tokenizer"):
        bk.RewardModel(lengths_of).fit(TOKENS, simulated(5, 0)[0], seed=0)
    with pytest.raises(bk.TextRewardError, match="Completion 0 is the text 'ab', but the prior has no tokenizer"):
        bk.RewardModel(bk.TokenFeatures(counts)).fit(TOKENS, PAIRS, seed=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": 3}, "features is a function"),
        ({"prior_scale": 0.0}, "prior_scale must be"),
        ({"num_components": 0}, "num_components must be"),
        ({"num_chains": 0}, "num_chains must be"),
        ({"target_accept": 1.0}, "target_accept"),
    ],
)
def test_bad_models(options: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.RewardModel(**{"features": lengths_of, **options})


def test_features_of_another_number_are_refused_later() -> None:
    widths = iter([2, 3])
    features = FeatureMap.fitted(as_features(lambda completions: 0), np.array([[1.0, 2.0], [2.0, 1.0]]))
    changing = FeatureMap(
        as_features(lambda completions: np.ones((len(completions), next(widths)))),
        features.mean,
        None,
        features.scale,
    )
    batch = PAIRS.batch(LETTERS)
    assert changing(batch).shape == (6, 2)
    with pytest.raises(bk.BayesKLRLError, match=r"shape \(M, 2\), as in training; got \(6, 3\)"):
        changing(batch)


def test_principal_components_keep_what_varies_most() -> None:
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((200, 2)) @ np.array([[3.0, 3.0, 0.0], [0.0, 0.1, 1.0]]) + 5.0
    features = FeatureMap.fitted(as_features(lambda completions: 0), raw, 2)
    z = features.standardised(raw)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(2), atol=1e-9)
    assert abs(np.corrcoef(z[:, 0], raw[:, 0])[0, 1]) > 0.99


def test_numpyro_that_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bayes_klrl.reward_models.numpyro_program", raising=False)
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(ImportError, match=r"RewardModel needs the package numpyro: pip install 'bayes_klrl\[jax\]'"):
        bk.RewardModel(lengths_of).fit(LETTERS, PAIRS, seed=0)


def test_hidden_states_are_those_after_the_last_token_but_eos() -> None:
    """Against one forward pass over prompt and completion, read off by hand."""
    torch = pytest.importorskip("torch")
    from bayes_klrl.problems import random_gpt2_task

    lm = random_gpt2_task(seed=0).prior
    eos = min(lm.eos_token_ids)
    others = [a for a in range(lm.vocab_size) if a not in lm.eos_token_ids]
    completions = [[others[0], others[1], eos], [others[2], others[0], others[1], others[1]], [eos], [others[1], eos]]
    prompts = [(others[0],), (others[1], others[2]), (others[2],), (others[0],)]
    batch = training_batch(lm, prompts, [tuple(x) for x in completions], {})
    found = bk.HiddenStates(lm)(batch)
    for prompt, x, states in zip(prompts, completions, found, strict=True):
        text = [a for a in x if a != eos]
        with torch.no_grad():
            out = lm.module(torch.tensor([[*prompt, *text]]), output_hidden_states=True)
        np.testing.assert_allclose(states, out.hidden_states[-1][0, -1].numpy(), atol=1e-5)
