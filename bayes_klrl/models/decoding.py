"""The one decode loop: completions drawn token by token from one model, scored in lockstep by others.

Everything that draws completions (importance sampling, best-of-n, SMC, the Pyro site) steps a `Decoding`. The exception is
a model that can draw the rest of independent completions in one call (`Lockstep`). Tokens and summed log-probs are NumPy
arrays on the host; next-token log-probs and caches stay on the device of the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bayes_klrl.arrays import drawn_tokens, is_identity, overridden, take_tokens, to_host_together
from bayes_klrl.errors import CheckpointError, SupportError
from bayes_klrl.models.completions import Completions, joined
from bayes_klrl.models.memory import Part, parts
from bayes_klrl.models.out_of_memory import by_halves
from bayes_klrl.models.passes import fits, next_log_probs_of, passes
from bayes_klrl.posterior import check_language_model, completion_log_probs
from bayes_klrl.randomness import PromptKey, Streams, prompt_keys
from bayes_klrl.sequences import completion_lengths, pad_token
from bayes_klrl.typing import Array, FloatArray, IntArray, LanguageModel, Lockstep, State, TokenIds

__all__ = ["Decoding", "check_proposal", "decode", "decode_by", "draw_blocks", "scoring_gap"]

ROWS_PER_BLOCK = 512
"""The most completions, over all prompts, that are drawn before rewards are computed."""

_COMPACT_BELOW = 0.8  # share of the state rows in use below which the unused ones are dropped


def check_proposal(proposal: LanguageModel, prior: LanguageModel, *, covers: bool = False) -> None:
    """Refuse a proposal on another vocabulary, or one that gives probability 0 to tokens that the prior can draw.

    Parameters
    ----------
    proposal, prior
        The two models.
    covers
        True if the caller knows that the proposal reaches everything that has posterior probability; support is then not
        checked.

    Raises
    ------
    CheckpointError
        If vocabulary size or EOS ids differ.
    SupportError
        If the prior gives mass to every token and the proposal does not: the evidence would be biased low without warning.
    """
    if proposal is prior:
        return
    check_shares_vocabulary("The proposal", proposal, prior)
    if prior.full_support and not proposal.full_support and not covers:
        raise SupportError(
            "The proposal gives probability 0 to some tokens that the prior can draw, so the posterior there would be "
            "missed without any warning. Use a proposal with full support (no top-k or top-p, no masked logits)."
        )


def check_shares_vocabulary(what: str, lm: LanguageModel, prior: LanguageModel) -> None:
    """Refuse an object that is not a language model, or one whose vocabulary size or EOS ids differ from the prior's.

    Parameters
    ----------
    what
        The name of the object at the start of the error message.
    lm, prior
        The object, and the model that it is compared with.
    """
    check_language_model(what, lm)
    if lm.vocab_size != prior.vocab_size or lm.eos_token_ids != prior.eos_token_ids:
        raise CheckpointError(
            f"{what} has {lm.vocab_size} tokens and EOS {sorted(lm.eos_token_ids)}, the prior {prior.vocab_size} and "
            f"{sorted(prior.eos_token_ids)}. They must share one vocabulary."
        )


class Decoding(Completions):
    """N unfinished or finished completions for each of P prompts; R = P * N rows, prompt by prompt.

    Rows with the same prefix share one row of the models' states: after the prompt, after a resampling, and as long as they
    draw the same tokens. Rows that have ended are dropped from a state once they are more than a fifth of its rows.
    Otherwise states grow in place. Nothing is computed after the last token. Next-token log-probs are computed for some state
    rows at a time where all of them would take too much memory (`passes`).

    Parameters
    ----------
    models
        The language models. The first one draws, all of them score. An object that occurs twice is run once. So is a model
        beside another one that wraps it, that is, one which has it as its `base` and returns the log-probs of both by
        `log_probs_with_base(state, rows)`, of some rows or, for None, of all.
    prompt_ids
        Token ids of the P prompts.
    num_draws
        N, the number of completions per prompt.
    max_new_tokens
        T, the largest length of a completion.

    Attributes
    ----------
    tokens, lengths
        The tokens (R, T), with filler past the lengths, and the number of tokens so far (R,).
    finished
        True for rows that ended with EOS or are T tokens long, shape (R,).
    log_probs
        log p(x_1:t | c) of the tokens so far of each row under each model, in nats, shape (len(models), R), float64.
    model_tokens
        Number of tokens that went through a model so far.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        prompt_ids: Sequence[TokenIds],
        num_draws: int,
        max_new_tokens: int,
    ) -> None:
        num_prompts = len(prompt_ids)
        self.particles_per_pass = num_rows = num_prompts * num_draws
        distinct = {id(model): model for model in models}
        # a model that wraps another (a twisted prior) carries the other's state in its own and gives both log-probs
        self._carriers = {id(model) for model in distinct.values() if id(getattr(model, "base", None)) in distinct}
        carried = {id(model.base) for model in distinct.values() if id(model) in self._carriers}  # type: ignore[attr-defined]
        self._keys = [id(model) for model in models]
        run = [model for key, model in distinct.items() if key not in carried]
        self._distinct = sorted(run, key=self._draws, reverse=True)  # the one that draws comes first
        self._vocab_size = models[0].vocab_size
        self._eos = np.array(sorted(models[0].eos_token_ids), dtype=np.int64)
        self._filler = pad_token(models[0].eos_token_ids)
        self.step_count = 0
        self.max_new_tokens = max_new_tokens
        self.prompt_index = np.repeat(np.arange(num_prompts), num_draws)
        self.tokens: IntArray = np.full((num_rows, max_new_tokens), self._filler, dtype=np.int64)
        self.lengths: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.finished = np.zeros(num_rows, dtype=bool)
        self.log_probs: FloatArray = np.zeros((len(models), num_rows))
        self._states: list[State] = [model.prefill(prompt_ids) for model in self._distinct]
        # a mixture counts as the several models that it runs
        self._num_models = sum(getattr(model, "num_models", 1) for model in self._distinct)
        self.model_tokens = self._num_models * sum(len(ids) for ids in prompt_ids)
        # row i continues row _state_row[i] of the models' states, which lack the newest token
        self._state_row: IntArray = self.prompt_index.copy()
        self._num_state_rows = num_prompts

    @property
    def done(self) -> bool:
        """True if every row has finished."""
        return bool(self.finished.all())

    def step(self, uniforms: FloatArray, forced: IntArray | None = None) -> IntArray:
        """Add one token to every unfinished row: a drawn one, or the forced one.

        Parameters
        ----------
        uniforms
            Uniform random numbers in [0, 1), shape (R,); those of finished rows are not used.
        forced
            The next token of rows that must not draw, -1 for rows that draw, shape (R,). Forced tokens are scored by the
            same call as drawn ones. None: all rows draw.

        Returns
        -------
        The indices of the rows that finished with this token.
        """
        if self.step_count:
            self._advance()
        rows = np.flatnonzero(~self.finished)
        owners = self._state_row[rows]
        if fits(self._num_state_rows, self._vocab_size):
            self._extend(rows, None, uniforms, forced)
        else:
            for state_rows in passes(np.unique(owners), self._vocab_size):
                self._extend(rows[np.isin(owners, state_rows)], state_rows, uniforms, forced)
        tokens = self.tokens[rows, self.step_count]
        self.lengths[rows] += 1
        self.step_count += 1
        ended = np.isin(tokens, self._eos) | (self.step_count == self.max_new_tokens)
        self.finished[rows[ended]] = True
        return rows[ended]

    def reorder(self, ancestors: IntArray) -> None:
        """Replace row i by row `ancestors[i]`, which must belong to the same prompt; ancestors of shape (R,)."""
        self.tokens, self.lengths = self.tokens[ancestors], self.lengths[ancestors]
        self.finished, self.log_probs = self.finished[ancestors], self.log_probs[:, ancestors]
        self._state_row = self._state_row[ancestors]

    def _extend(
        self, rows: IntArray, state_rows: IntArray | None, uniforms: FloatArray, forced: IntArray | None
    ) -> None:
        """Add one token to some rows, and its log-prob under every model; `state_rows` are those of the rows, None for all."""
        owners = self._state_row[rows]
        owners = owners if state_rows is None else np.searchsorted(state_rows, owners)
        tokens: Array = None
        taken: dict[int, Array] = {}
        for model, state in zip(self._distinct, self._states, strict=True):
            log_probs = self._next_log_probs(model, state, state_rows)
            if tokens is None:
                tokens = drawn_tokens(log_probs[self._keys[0]], owners, uniforms[rows])
                tokens = tokens if forced is None else overridden(tokens, forced[rows])
            taken |= {key: take_tokens(array, owners, tokens) for key, array in log_probs.items()}
            log_probs.clear()  # before the next model makes a table as large
        # tokens and log-probs come to the host together: on an accelerator it waits once per token
        self.tokens[rows, self.step_count], *scores = to_host_together([tokens, *taken.values()])
        for k, key in enumerate(self._keys):
            self.log_probs[k, rows] += scores[list(taken).index(key)]

    def _next_log_probs(self, model: LanguageModel, state: State, state_rows: IntArray | None) -> dict[int, Array]:
        """Return the next-token log-probs of a model, and of the one that it wraps, by their identities."""
        if id(model) in self._carriers:
            both = model.log_probs_with_base(state, state_rows)  # type: ignore[attr-defined]
            return dict(zip((id(model), id(model.base)), both, strict=True))  # type: ignore[attr-defined]
        if state_rows is None:
            return {id(model): model.next_log_probs(state)}
        return {id(model): next_log_probs_of(model, state, state_rows)}

    def _draws(self, model: LanguageModel) -> bool:
        """Return whether the log-probs that tokens are drawn by come from this model, its own or those of its base."""
        return self._keys[0] in (id(model), id(getattr(model, "base", None)))

    def _advance(self) -> None:
        """Append the newest tokens to the states, with one state row for each distinct unfinished prefix."""
        rows = np.flatnonzero(~self.finished)
        newest = self.tokens[rows, self.step_count - 1]
        owners = self._state_row[rows]
        fed, states = newest, self._states
        if not is_identity(owners, self._num_state_rows):  # some share a state row, or some have ended
            width = int(newest.max()) + 1
            keys, group = distinct_in_order(owners * width + newest)
            parents, tokens = keys // width, keys % width
            if np.unique(parents).size == parents.size >= _COMPACT_BELOW * self._num_state_rows:
                # one token for each state row that is still needed: grow in place, and feed the other rows filler
                fed = np.full(self._num_state_rows, self._filler)
                fed[parents] = tokens
            else:
                self._state_row[rows] = group
                self._num_state_rows = parents.size
                fed = tokens
                states = [model.select(state, parents) for model, state in zip(self._distinct, states, strict=True)]
        self._states = [model.append(state, fed) for model, state in zip(self._distinct, states, strict=True)]
        self.model_tokens += self._num_models * self._num_state_rows

    def lockstep(self) -> Lockstep | None:
        """Return a function that draws independent completions from the models in one call; None if they offer none."""
        offered = None if self._carriers else getattr(self._distinct[0], "lockstep", None)
        drawing: Lockstep | None = None if offered is None else offered(self._distinct)
        return drawing

    def num_unfinished(self) -> tuple[int, int]:
        """Return the number of unfinished rows, and the number of distinct prefixes among them."""
        rows = np.flatnonzero(~self.finished)
        newest = self.tokens[rows, self.step_count - 1]
        return rows.size, np.unique(self._state_row[rows] * (int(newest.max(initial=0)) + 1) + newest).size

    def finish(self, lockstep: Lockstep, uniforms: FloatArray) -> None:
        """Draw all missing tokens in one call, by the uniforms (T, R) that single steps would have used."""
        done, unfinished = self.step_count, np.flatnonzero(~self.finished)
        whole = getattr(lockstep, "bounds_tables", False)  # it makes tables of log-probs in passes itself
        for rows in [unfinished] if whole else passes(unfinished, self._vocab_size):
            newest = self.tokens[rows, done - 1]
            tokens, log_probs, model_tokens = lockstep(
                self._states, self._state_row[rows], newest, uniforms[done:, rows]
            )
            lengths = completion_lengths(tokens, self._eos)
            self.tokens[rows, done:] = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, self._filler)
            self.lengths[rows] += lengths
            keys = [id(model) for model in self._distinct]
            self.log_probs[:, rows] += log_probs[[keys.index(key) for key in self._keys]]
            self.finished[rows] = True
            self.model_tokens += model_tokens
            self.step_count = max(self.step_count, done + int(lengths.max()))


def distinct_in_order(keys: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct keys in order of first appearance, and the position of each key among them.

    In this order rows that share no prefix get state rows in their own order, and no later step has to gather.

    Examples
    --------
    >>> distinct_in_order(np.array([7, 3, 7, 5]))
    (array([7, 3, 5]), array([0, 1, 0, 2]))
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    return keys[first[order]], place[group]


def scoring_gap(decoding: Completions, models: Sequence[LanguageModel], prompt_ids: Sequence[TokenIds]) -> FloatArray:
    """Return the largest difference between decoded and teacher-forced log-probs of each prompt's completions, in nats, (P,).

    All weights come from decoding alone, so the difference is not an error of the weights. It says how far the model, in its
    precision, is from being one distribution (0.07 nats per sequence were measured in bfloat16, 1e-4 is normal in float32).
    """
    sequences = decoding.sequences()
    decoded = decoding.log_probs.reshape(len(models), *sequences.lengths.shape)
    scored = [completion_log_probs(model, prompt_ids, sequences) for model in models]
    with np.errstate(invalid="ignore"):  # -inf both ways is agreement
        gap: FloatArray = np.nan_to_num(np.abs(np.stack(scored) - decoded)).max(axis=(0, 2))
    return gap


def decode(
    models: Sequence[LanguageModel],
    prompt_ids: Sequence[TokenIds],
    num_draws: int,
    max_new_tokens: int,
    rng: np.random.Generator,
) -> Completions:
    """Return N completions per prompt, drawn independently from `models[0]` and scored by all, by one generator.

    The generator ends in the state in which it would be after drawing the uniforms of the steps that were needed only. For
    draws that belong to a seed use `decode_by`.
    """
    before, num_rows = rng.bit_generator.state, len(prompt_ids) * num_draws
    decoding = decode_by(models, prompt_ids, rng.random((max_new_tokens, num_rows)))
    rng.bit_generator.state = before
    rng.random((decoding.step_count, num_rows))
    return decoding


def decode_by(models: Sequence[LanguageModel], prompt_ids: Sequence[TokenIds], uniforms: FloatArray) -> Completions:
    """Return N completions per prompt, drawn independently from `models[0]` and scored by all.

    They are decoded at once, or in as many parts as the free memory and the lengths of the prompts ask for (`memory`). If
    memory runs out all the same, a part is decoded as two halves (`out_of_memory`).

    Parameters
    ----------
    models, prompt_ids
        The models and the prompts, as for `Decoding`.
    uniforms
        Uniform random numbers in [0, 1), shape (T, P * N), prompt by prompt.
    """
    max_new_tokens, num_rows = uniforms.shape
    num_prompts, num_draws, lengths = len(prompt_ids), num_rows // len(prompt_ids), list(map(len, prompt_ids))
    index = np.arange(num_rows).reshape(num_prompts, num_draws)

    def decoded(part: Part) -> Decoding:
        own = uniforms if part.size() == num_rows else uniforms[:, part.of(index)]
        return _decoded(models, [prompt_ids[p] for p in part.prompts], own)

    planned, longest = parts(models, lengths, num_draws, max_new_tokens), max(lengths) + max_new_tokens
    halving = by_halves(decoded, planned, Part.size, Part.halves, doing="decoded", models=models, num_tokens=longest)
    found = list(halving)
    if len(found) == 1:
        return found[0][1]
    rows = [part.of(index) for part, _ in found]
    return joined([decoding for _, decoding in found], rows, np.repeat(np.arange(num_prompts), num_draws))


def _decoded(models: Sequence[LanguageModel], prompt_ids: Sequence[TokenIds], uniforms: FloatArray) -> Decoding:
    """Return N completions per prompt that are decoded at once.

    Tokens are drawn step by step until the models can draw the rest in one call and this is faster. The result is the same,
    since both use the same uniforms.
    """
    max_new_tokens, num_rows = uniforms.shape
    decoding = Decoding(models, prompt_ids, num_rows // len(prompt_ids), max_new_tokens)
    lockstep = decoding.lockstep()
    while not decoding.done:
        decoding.step(uniforms[decoding.step_count])
        if lockstep is not None and not decoding.done and lockstep.is_faster(*decoding.num_unfinished()):
            decoding.finish(lockstep, uniforms)
    return decoding


def draw_blocks(
    models: Sequence[LanguageModel],
    prompt_ids: Sequence[TokenIds],
    num_draws: int,
    max_new_tokens: int,
    streams: Streams,
    *,
    keys: Sequence[PromptKey] | None = None,
    first: int = 0,
) -> Iterator[Completions]:
    """Yield finished decodings that together hold N completions per prompt, each small enough to be held in memory.

    Parameters
    ----------
    models, prompt_ids, num_draws, max_new_tokens
        The models, the prompts, N and T, as for `Decoding`.
    streams
        The source of all random numbers. A draw does not depend on the block that it is in.
    keys
        The key of each prompt's stream; None: `prompt_keys(prompt_ids)`.
    first
        Number of the first draw.
    """
    keys = prompt_keys(prompt_ids) if keys is None else keys
    most = max(1, ROWS_PER_BLOCK // len(prompt_ids))
    for start in range(0, num_draws, most):
        uniforms = streams.uniforms(keys, first + start, min(most, num_draws - start), max_new_tokens)
        yield decode_by(models, prompt_ids, uniforms)
