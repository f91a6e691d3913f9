"""`check_posterior` finds what is wrong with models that break one promise each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk

TABLE = np.log(np.random.default_rng(0).dirichlet(np.ones(6), size=6))
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)


class Bigram:
    """A right model of a user's own: the state is the list of tokens so far."""

    vocab_size = 6
    eos_token_ids = frozenset({0})
    full_support = True
    tokenizer = None

    def encode(self, texts: Any) -> Any:
        raise NotImplementedError

    decode = encode

    def rows(self, states: list[list[int]]) -> np.ndarray:
        return np.stack([TABLE[state[-1]] for state in states])

    def prefill(self, prompts: Any) -> Any:
        return [list(prompt) for prompt in prompts]

    def next_log_probs(self, state: Any) -> Any:
        return self.rows(state)

    def append(self, state: Any, tokens: Any) -> Any:
        return [[*row, int(token)] for row, token in zip(state, tokens, strict=True)]

    def select(self, state: Any, rows: Any) -> Any:
        return [state[row] for row in rows]

    def score(self, row: list[int], completion: list[int]) -> list[float]:
        found = []
        for token in completion:
            found.append(float(self.rows([row])[0, token]))
            row = [*row, token]
        return found

    def token_log_probs(self, prompts: Any, sequences: Any) -> Any:
        found = np.zeros(sequences.tokens.shape)
        for p, n in np.ndindex(*sequences.lengths.shape):
            length = sequences.lengths[p, n]
            found[p, n, :length] = self.score(list(prompts[p]), sequences.tokens[p, n, :length].tolist())
        return found


class TooLikelyLater(Bigram):
    def rows(self, states: Any) -> np.ndarray:
        return super().rows(states) + np.array([0.2 * (len(state) > 1) for state in states])[:, None]


class TooLikelyAfterOneToken(Bigram):
    def rows(self, states: Any) -> np.ndarray:
        return super().rows(states) + np.array([0.2 * (state[-1] == 3 and len(state) > 1) for state in states])[:, None]


class NoEosLater(Bigram):
    def rows(self, states: Any) -> np.ndarray:
        found = super().rows(states).copy()
        found[[len(state) > 1 for state in states], 0] = -np.inf
        return found


class WritesIntoOldStates(Bigram):
    def append(self, state: Any, tokens: Any) -> Any:
        for row, token in zip(state, tokens, strict=True):
            row.append(int(token))
        return [list(row) for row in state]


class LooksAhead(Bigram):
    def score(self, row: list[int], completion: list[int]) -> list[float]:
        found = super().score(row, completion)
        if len(found) > 1 and completion[1] == 3:
            found[0], found[1] = found[0] + 0.5, found[1] - 0.5
        return found


class DependsOnManyRows(Bigram):
    def token_log_probs(self, prompts: Any, sequences: Any) -> Any:
        found = super().token_log_probs(prompts, sequences)
        return found + 0.01 * (sequences.lengths.size > 100) * sequences.mask


class SelectsWronglyAmongMany(Bigram):
    def select(self, state: Any, rows: Any) -> Any:
        return [state[row if n < 100 else 0] for n, row in enumerate(rows)]


class Raises(Bigram):
    def append(self, state: Any, tokens: Any) -> Any:
        raise RuntimeError("boom")


class WrongShape(Bigram):
    def next_log_probs(self, state: Any) -> Any:
        return self.rows(state)[0]


BROKEN = {
    TooLikelyLater: "sum to 1 after every prefix",
    TooLikelyAfterOneToken: "sum to 1 after every prefix",
    NoEosLater: "sum to 1 after every prefix",
    WritesIntoOldStates: "same log-probs after it was appended to",
    LooksAhead: "no later token changes an earlier log-prob",
    DependsOnManyRows: "does not depend on its batch",
    SelectsWronglyAmongMany: "select repeats rows",
    Raises: "RuntimeError: boom",
    WrongShape: r"shape \(R, V\)|IndexError|AxisError",
}


def posterior_of(lm: Any) -> bk.Posterior:
    return bk.Posterior(lm, LONGER, prompts=[[1], [2]], max_new_tokens=4)


def test_a_right_model_passes() -> None:
    report = bk.check_posterior(posterior_of(Bigram()))
    assert report, report


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_found(kind: type[Bigram]) -> None:
    report = bk.check_posterior(posterior_of(kind()))
    assert not report
    with pytest.raises(bk.BayesKLRLError, match=BROKEN[kind]):
        report.raise_if_broken()


def test_half_precision_is_no_mistake_and_is_reported() -> None:
    """The shipped model in bfloat16: its log-probs differ from path to path by rounding, and the report says by how much."""
    prior = bk.TorchLM.from_pretrained("austen", dtype="bfloat16")
    report = str(bk.check_posterior(bk.Posterior(prior, LONGER, prompts="It was", max_new_tokens=16)))
    assert "BROKEN" not in report
    (line,) = [line for line in report.splitlines() if "sampler and scorer agree" in line]
    assert 1e-5 < float(line.split("up to ")[1].split()[0]) < 0.1
