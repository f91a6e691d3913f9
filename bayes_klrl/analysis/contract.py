"""An executable contract: the properties that every algorithm relies on, checked on a user's own model and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.decoding import decode
from bayes_klrl.posterior import Posterior, completion_log_probs
from bayes_klrl.randomness import generator
from bayes_klrl.sequences import Sequences

__all__ = ["Check", "ContractReport", "check_posterior"]

_REWARD_TOLERANCE = 1e-5
_TOKEN_TOLERANCE = 1e-5
_HALF_TOLERANCE = (
    0.1  # nats per token in bfloat16, whose rounding is no mistake; what was found is reported all the same
)
_RELATIVE_TOLERANCE = 2e-6  # of an improbable token's log-prob, by float32's rounding
_NUM_DRAWS = 32
_NUM_IDS = 5
_MANY_ROWS = 160


@dataclass(frozen=True)
class Check:
    """One property of the contract, whether it holds, and the numbers that were seen."""

    promise: str
    kept: bool
    seen: str


@dataclass(frozen=True)
class ContractReport:
    """The result of `check_posterior`; it is true if every property holds, and printing it shows one line per property."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.kept for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(f"{'ok    ' if c.kept else 'BROKEN'} {c.promise}: {c.seen}" for c in self.checks)

    __repr__ = __str__

    def raise_if_broken(self) -> None:
        """Raise a `BayesKLRLError` that lists the broken promises, if any."""
        broken = [f"{check.promise}: {check.seen}" for check in self.checks if not check.kept]
        if broken:
            raise BayesKLRLError("The posterior breaks what the algorithms rely on. " + "; ".join(broken))


def check_posterior(posterior: Posterior, *, seed: int = 0) -> ContractReport:
    """Check the properties that every algorithm relies on, and return a report that says which of them are broken.

    The model: a `TorchLM` gives the log-probs of its own plain forward; next-token log-probs are normalised and hold no NaN;
    decoding and teacher forcing give the same log-probs (EOS, padding, positions, temperature), whatever else is in the batch;
    no later token changes an earlier log-prob, and the log-prob of two tokens is that of the first plus that of the second;
    states can be permuted and repeated; `append` leaves the old state as it was. The likelihood: a completion gets the same
    reward alone, in a batch and in another order, whatever stands past its end; at least one draw has positive likelihood.

    Parameters
    ----------
    posterior
        The posterior to check, with a model or a reward of your own.
    seed
        Seed for the draws that are checked.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> bool(bk.check_posterior(bk.Posterior(coin, longer, max_new_tokens=3)))
    True
    """
    rng = generator(seed)
    first = list(_made("the model draws completions", lambda: _normalised(posterior)))
    if not all(check.kept for check in first):
        return ContractReport(tuple(first))
    try:
        drawn = decode((posterior.prior,), posterior.prompt_ids, _NUM_DRAWS, posterior.max_new_tokens, rng)
    except Exception as error:  # whatever a user's model raises
        raised = Check("the model draws completions", False, f"{type(error).__name__}: {error}")
        return ContractReport((*first, raised))
    sequences, log_probs = drawn.sequences(), drawn.log_probs[0].reshape(posterior.num_prompts, -1)
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        lambda: _own_forward(posterior),
        lambda: _rows_of_every_step(posterior, sequences),
        lambda: _sampler_is_scorer(posterior, sequences, log_probs),
        lambda: _batch_does_not_matter(posterior, sequences),
        lambda: _causal(posterior, sequences),
        lambda: _last_two_tokens(posterior),
        lambda: _states_are_values(posterior),
        lambda: _reward_is_a_function(posterior, sequences, rng),
    )
    later = [check for part in parts for check in _made("the model and the reward can be called", part)]
    return ContractReport((*first, *later))


def _made(promise: str, part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the checks of a part, and what it raised as a broken promise."""
    try:
        yield from part()
    except Exception as error:  # whatever a user's model or reward raises
        yield Check(promise, False, f"{type(error).__name__}: {error}")


def _rows_of_every_step(posterior: Posterior, sequences: Sequences) -> Iterator[Check]:
    """Check along drawn completions, row by row, that next-token probabilities sum to 1 and that old states do not change."""
    prior, num_prompts = posterior.prior, posterior.num_prompts
    num_draws = sequences.tokens.shape[1]
    tokens = sequences.tokens.reshape(-1, posterior.max_new_tokens)
    unfinished = sequences.mask.reshape(tokens.shape)
    off, moved = 0.0, 0.0
    with no_gradient():
        state = prior.select(prior.prefill(posterior.prompt_ids), np.repeat(np.arange(num_prompts), num_draws))
        for t in range(posterior.max_new_tokens):
            rows = to_host(prior.next_log_probs(state)).astype(np.float64)
            alive = unfinished[:, t]
            with np.errstate(over="ignore"):
                sums = np.exp(rows[alive]).sum(axis=-1)
            off = max(off, float(np.nan_to_num(np.abs(sums - 1), nan=np.inf).max(initial=0.0)))
            if t + 1 == posterior.max_new_tokens or not unfinished[:, t + 1].any():
                break
            after = prior.append(state, tokens[:, t])
            again = to_host(prior.next_log_probs(state)).astype(np.float64)
            with np.errstate(invalid="ignore"):
                change = np.abs(again - rows)[alive][again[alive] != rows[alive]]
            moved = max(moved, float(np.nan_to_num(change, nan=np.inf).max(initial=0.0)))
            state = after
    yield Check("next-token probabilities sum to 1 after every prefix that was drawn", off < 1e-4, f"off by {off:.1e}")
    yield Check(
        "a state gives the same log-probs after it was appended to", moved < _tolerance(posterior), f"{moved:.1e} nats"
    )


def _own_forward(posterior: Posterior) -> Iterator[Check]:
    """Check a model that can compare itself with an independent computation of its numbers."""
    check_numbers = getattr(posterior.prior, "check_numbers", None)
    if check_numbers is None:
        return
    try:
        kept, seen = True, str(check_numbers())
    except CheckpointError as error:
        kept, seen = False, str(error)
    yield Check("log-probs are those of the model's own forward, prefix by prefix", kept, seen)


def _causal(posterior: Posterior, sequences: Sequences) -> Iterator[Check]:
    """Check that the log-probs of a completion's tokens do not depend on its last token, or on what stands past its end."""
    prior, num_tokens = posterior.prior, posterior.max_new_tokens
    if num_tokens == 1:
        return
    filler = posterior.pad_token
    last = sequences.lengths[..., None] - 1
    earlier = np.arange(num_tokens) < last
    with no_gradient():
        before = to_host(prior.token_log_probs(posterior.prompt_ids, sequences)).astype(np.float64)
    off = 0.0
    for shift in range(1, min(prior.vocab_size, _NUM_IDS + 1)):
        other = sequences.tokens.copy()
        replaced = (np.take_along_axis(other, last, axis=2) + shift) % prior.vocab_size
        np.put_along_axis(other, last, replaced, axis=2)
        other = np.where(sequences.mask, other, (filler + shift) % prior.vocab_size)
        with no_gradient():
            found = prior.token_log_probs(posterior.prompt_ids, Sequences(other, sequences.lengths))
        after = to_host(found).astype(np.float64)
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(np.abs(before - after), nan=np.inf)[earlier & (before != after)]
        off = max(off, float(moved.max(initial=0.0)))
    yield Check(
        "no later token changes an earlier log-prob", off < _tolerance(posterior), f"up to {off:.1e} nats per token"
    )


def _last_two_tokens(posterior: Posterior) -> Iterator[Check]:
    """Check that the scored log-prob of two tokens is what decoding gives the first one, and the second one after it."""
    if posterior.max_new_tokens == 1:
        return
    prior, prompts = posterior.prior, posterior.prompt_ids[:1]
    with no_gradient():
        state = prior.prefill(prompts)
        first = to_host(prior.next_log_probs(state)).astype(np.float64)[0]
        likely = [int(token) for token in np.argsort(-first) if int(token) not in prior.eos_token_ids][:_NUM_IDS]
        likely = [token for token in likely if np.isfinite(first[token])]
        if not likely:
            return
        after = prior.append(prior.select(state, np.zeros(len(likely), dtype=np.int64)), np.array(likely))
        second = to_host(prior.next_log_probs(after)).astype(np.float64)  # (ids, V)
        ids = np.argsort(-second, axis=1)[:, :_NUM_IDS]
        pairs = np.stack([np.repeat(likely, ids.shape[1]), ids.ravel()], axis=1)[None]
        scored = to_host(prior.token_log_probs(prompts, Sequences(pairs, np.full(pairs.shape[:2], 2))))
    joint = scored.astype(np.float64).sum(axis=2).ravel()
    expected = (first[likely][:, None] + np.take_along_axis(second, ids, axis=1)).ravel()
    off = float(np.abs(joint - expected)[joint != expected].max(initial=0.0))
    yield Check(
        "two tokens have the log-prob of the first plus that of the second",
        off < 2 * _tolerance(posterior),
        f"up to {off:.1e} nats over {joint.size} pairs",
    )


def _normalised(posterior: Posterior) -> Iterator[Check]:
    """Check that every next-token distribution sums to 1."""
    prior = posterior.prior
    with no_gradient():
        rows = to_host(prior.next_log_probs(prior.prefill(posterior.prompt_ids))).astype(np.float64)
    expected = (posterior.num_prompts, prior.vocab_size)
    yield Check("next_log_probs has the shape (R, V)", rows.shape == expected, f"{rows.shape}, expected {expected}")
    nan = bool(np.isnan(rows).any())
    yield Check("next_log_probs holds no NaN", not nan, "NaN found" if nan else "none")
    off = float(np.abs(np.exp(rows).sum(axis=-1) - 1).max()) if not nan else np.nan
    yield Check("next-token probabilities sum to 1", off < 1e-4, f"off by {off:.1e}")


def _sampler_is_scorer(posterior: Posterior, sequences: Sequences, log_probs: np.ndarray) -> Iterator[Check]:
    """Check that decoded and teacher-forced log-probs agree."""
    scored = completion_log_probs(posterior.prior, posterior.prompt_ids, sequences)
    with np.errstate(invalid="ignore"):
        off = np.abs(scored - log_probs) / sequences.lengths
    worst = float(np.nanmax(off))
    yield Check(
        "sampler and scorer agree, EOS included",
        worst < _tolerance(posterior),
        f"up to {worst:.1e} nats per token over {off.size} draws",
    )


def _batch_does_not_matter(posterior: Posterior, sequences: Sequences) -> Iterator[Check]:
    """Check that a completion's log-prob does not depend on the other rows and prompts of its batch."""
    copies = -(-_MANY_ROWS // sequences.tokens.shape[1])
    many = Sequences(np.tile(sequences.tokens, (1, copies, 1)), np.tile(sequences.lengths, (1, copies)))
    with no_gradient():
        found = to_host(posterior.prior.token_log_probs(posterior.prompt_ids, many)).astype(np.float64).sum(axis=2)
    together = found[:, -sequences.tokens.shape[1] :]
    off = 0.0
    for p in range(min(posterior.num_prompts, 4)):
        for n in (0, sequences.tokens.shape[1] - 1):
            alone = Sequences(sequences.tokens[p : p + 1, n : n + 1], sequences.lengths[p : p + 1, n : n + 1])
            single = completion_log_probs(posterior.prior, [posterior.prompt_ids[p]], alone)[0, 0]
            if single != together[p, n]:
                off = max(
                    off, float(np.nan_to_num(abs(single - together[p, n]), nan=np.inf)) / int(alone.lengths[0, 0])
                )
    yield Check(
        "a completion's log-prob does not depend on its batch",
        off < _tolerance(posterior),
        f"up to {off:.1e} nats per token",
    )


def _states_are_values(posterior: Posterior) -> Iterator[Check]:
    """Check that select permutes and repeats rows, and that a state outlives what was appended to it."""
    if posterior.max_new_tokens == 1:  # nothing is ever appended, and a classifier need not be able to
        return
    prior = posterior.prior
    with no_gradient():
        start = prior.select(prior.prefill(posterior.prompt_ids), np.zeros(2, dtype=np.int64))
        tokens = np.array([0, prior.vocab_size - 1])
        after = to_host(prior.next_log_probs(prior.append(start, tokens)))
        again = to_host(prior.next_log_probs(prior.append(start, tokens[::-1].copy())))[::-1]
        swapped = prior.select(prior.append(start, tokens), np.array([1, 0]))
        swapped_rows = to_host(prior.next_log_probs(swapped))[::-1]
        order = np.arange(_MANY_ROWS)[::-1] % 2
        many = to_host(prior.next_log_probs(prior.select(prior.append(start, tokens), order)))
    yield Check("a state is unchanged by append", _close(after, again, posterior), "append twice on one state")
    yield Check("select permutes rows", _close(after, swapped_rows, posterior), "two rows swapped")
    yield Check("select repeats rows", _close(after[order], many, posterior), f"{_MANY_ROWS} rows of two")


def _reward_is_a_function(posterior: Posterior, sequences: Sequences, rng: np.random.Generator) -> Iterator[Check]:
    """Check that a reward depends on its completion and prompt only."""
    rewards = posterior.reward(sequences)
    order = rng.permutation(rewards.shape[1])
    shuffled = posterior.reward(Sequences(sequences.tokens[:, order], sequences.lengths[:, order]))
    moved = _num_apart(shuffled, rewards[:, order])
    yield Check("the reward does not depend on the order of the batch", moved == 0, f"{moved} of {rewards.size} differ")
    single = posterior.reward(Sequences(sequences.tokens[:, :1], sequences.lengths[:, :1]))
    moved = _num_apart(single[:, 0], rewards[:, 0])
    yield Check("the reward does not depend on the rest of the batch", moved == 0, f"{moved} of {len(single)} differ")
    alive = np.isfinite(rewards).any(axis=1)
    yield Check(
        "some draw has positive likelihood",
        bool(alive.all()),
        f"{int(np.isfinite(rewards).sum())} of {rewards.size} prior draws",
    )


def _num_apart(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many rewards differ by more than the rounding of a network's batch, relative to the largest."""
    finite = np.concatenate([first[np.isfinite(first)], second[np.isfinite(second)]])
    scale = max(1.0, float(np.abs(finite).max(initial=0.0)))
    return int((~np.isclose(first, second, rtol=0.0, atol=_REWARD_TOLERANCE * scale)).sum())


def _tolerance(posterior: Posterior) -> float:
    """Return how far apart two log-probs of one token may be by rounding, in nats."""
    return _HALF_TOLERANCE if getattr(posterior.prior, "half_precision", False) else _TOKEN_TOLERANCE


def _close(first: np.ndarray, second: np.ndarray, posterior: Posterior) -> bool:
    """Return whether log-probs agree within the tolerance of one token, equal infinities included."""
    return bool(np.allclose(first, second, rtol=_RELATIVE_TOLERANCE, atol=_tolerance(posterior)))
