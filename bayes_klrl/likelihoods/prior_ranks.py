"""How high a score ranks among the prior's completions of the same prompt: the distribution function F of the score.

A score s has the cell [F(s-), F(s)] of the unit interval, whose mass is that of its ties. F is known in one of two ways:

* estimated from M reference draws per prompt: F(s-) = #{s_m < s} / (M + 1), and the cell has mass
  (1 + #{s_m = s}) / (M + 1). The completion counts as one more draw, so that its cell is never empty, and ranks of prior
  draws are uniform for every M;
* exact, by enumeration of all completions.

A score that a network computes is rounded differently in each batch. So a completion that F was made of keeps its level by its
token ids, and is not scored again; only others are found by their score. Scores that differ by no more than rounding are ties.
How large that is, is measured: a few completions are scored twice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import all_sequences, num_sequences
from bayes_klrl.likelihood import Factor, Likelihood, Reward
from bayes_klrl.likelihoods.scoring import batch_log_probs, posterior_of
from bayes_klrl.models.decoding import draw_blocks
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["PriorRanks", "RankedFactor", "check_reference", "score_of"]

Keys = NDArray[np.bytes_]
"""Digests of completions."""
_MOST_COMPLETIONS = 20_000
_NUM_SCORED_TWICE = 8
_MARGIN = 8.0  # the largest difference of 8 completions, and of all
_MOST_ROUNDING = 1e-4  # more is not rounding: a score that is random, or of half precision, is taken as it is
_STREAM = (70, 1024)  # of the seed: other draws with the same seed have other numbers


@dataclass(frozen=True, eq=False)
class Cells:
    """The distribution function of one prompt's score: its levels, and the prior mass at and below each.

    Parameters
    ----------
    lowest, highest
        The levels in increasing order, each from its lowest to its highest score, shape (L,).
    mass, below
        The mass of each level, shape (L,), and the mass below it, shape (L + 1,).
    own
        The mass that a completion's own draw adds to its cell: 1 / (M + 1), or 0 if F is exact.
    rounding
        The part of 1 + |score| by which two scores may differ that are one.
    keys, places
        The digests of the completions that F was made of, in order, and the level of each, shape (U,).
    """

    lowest: FloatArray
    highest: FloatArray
    mass: FloatArray
    below: FloatArray
    own: float
    rounding: float
    keys: Keys
    places: IntArray

    @classmethod
    def of(cls, keys: Keys, scores: FloatArray, masses: FloatArray, own: float, rounding: float) -> Cells:
        """Return the cells of some completions, their scores and masses, all (M,); `own` and all masses sum to 1."""
        keys, first, which = np.unique(keys, return_index=True, return_inverse=True)
        scores = scores[first]  # the same completion has one score
        values, value = np.unique(scores, return_inverse=True)
        starts = _level_starts(values, rounding)
        places = np.searchsorted(starts, value, side="right") - 1
        mass = np.bincount(places[which], weights=masses, minlength=len(starts)).astype(np.float64)
        below = np.concatenate([[0.0], mass.cumsum()])
        highest = values[np.append(starts[1:], len(values)) - 1]
        return cls(values[starts], highest, mass, below, own, rounding, keys, places)

    def known_places(self, keys: Keys) -> IntArray:
        """Return the levels of completions, -1 for one that F was not made of, shape (M,)."""
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, self.places[found], -1)

    def at(self, places: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return F(s-) and the mass of the cell of each level, both (M,)."""
        return self.below[places], self.mass[places] + self.own

    def of_scores(self, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return F(s-) and the mass of the cell of each score, both (M,): that of the nearest level within rounding."""
        tolerance = _tolerance(scores, self.rounding)
        place = np.searchsorted(self.highest, scores - tolerance)
        last = len(self.mass) - 1
        inside, following = np.minimum(place, last), np.minimum(place + 1, last)
        place = np.where(self._distance(following, scores) < self._distance(inside, scores), following, place)
        inside = np.minimum(place, last)
        is_tied = self._distance(inside, scores) <= tolerance
        return self.below[place], np.where(is_tied, self.mass[inside], 0.0) + self.own

    def _distance(self, places: IntArray, scores: FloatArray) -> FloatArray:
        """Return how far scores are from levels, 0 inside, shape (M,)."""
        with np.errstate(invalid="ignore"):
            outside = np.maximum(self.lowest[places] - scores, scores - self.highest[places])
        return np.where(np.isnan(outside), 0.0, np.maximum(outside, 0.0))  # NaN: the score -inf in the level -inf


@dataclass(frozen=True, eq=False)
class PriorRanks:
    """The distribution functions of a score under a prior, one for each prompt, made when they are first asked for.

    Parameters
    ----------
    base
        A posterior with the prior, the prompts and their columns, whose one factor is the score.
    fn
        The score as the user gave it.
    num_reference, seed
        Reference draws per prompt and their seed; `num_reference` None: F by enumeration.
    known
        What is known so far, which posteriors of a part of the prompts share.
    """

    base: Posterior
    fn: Any
    num_reference: int | None
    seed: int
    known: dict[Any, Any]

    def __call__(self, batch: Batch) -> tuple[FloatArray, FloatArray]:
        """Return F(s-) and the mass of the cell of each completion's score, both (M,)."""
        lower, mass, keys = np.empty(len(batch)), np.empty(len(batch)), _keys(batch.tokens, batch.lengths)
        prompts = {int(p): np.flatnonzero(batch.prompt_index == p) for p in np.unique(batch.prompt_index)}
        new: dict[int, IntArray] = {}
        for p, rows in prompts.items():
            places = self.cells(p).known_places(keys[rows])
            known, new[p] = rows[places >= 0], rows[places < 0]
            lower[known], mass[known] = self.cells(p).at(places[places >= 0])
        unscored = np.sort(np.concatenate([*new.values(), np.empty(0, np.int64)]))
        if unscored.size:
            scores = np.empty(len(batch))
            scores[unscored] = self._of(_part(batch, unscored))
            for p, rows in new.items():
                lower[rows], mass[rows] = self.cells(p).of_scores(scores[rows])
        return lower, mass

    def cells(self, p: int) -> Cells:
        """Return the distribution function of prompt p, from draws that depend on no other prompt."""
        base = self.base
        values = tuple(column[p] for column in base.columns.values())
        (score,) = base.likelihood.factors
        number = int(base.prompt_numbers[p]) if "prompt_index" in getattr(score, "asked_for", ()) else None
        # by identity, because values of columns need not be hashable; the entry keeps them alive
        objects = (base.prior, self.fn, *values)
        options = (
            self.num_reference,
            self.seed,
            base.max_new_tokens,
            base.prompt_ids[p],
            repr(base.prompts[p]),
            number,
        )
        key = (*options, *map(id, objects))
        if key not in self.known:
            self.known[key] = (self._estimated(p) if self.num_reference else self._enumerated(p), objects)
        cells: Cells = self.known[key][0]
        return cells

    def _estimated(self, p: int) -> Cells:
        """Return F from reference draws, scored block by block."""
        num_draws = self.num_reference or 0
        ids = self.base.prompt_ids[p]
        blocks = draw_blocks(
            (self.base.prior,),
            [ids],
            num_draws,
            self.base.max_new_tokens,
            Streams.of(self.seed, *_STREAM),
            keys=[(0, *ids)],
        )
        scored = [self._scored(block.tokens, block.lengths, p) for block in blocks]
        keys, scores = (np.concatenate(each) for each in list(zip(*scored, strict=True))[:2])
        rounding = max(each[2] for each in scored)
        return Cells.of(keys, scores, np.full(num_draws, 1 / (num_draws + 1)), 1 / (num_draws + 1), rounding)

    def _enumerated(self, p: int) -> Cells:
        """Return F from all completions."""
        prior = self.base.prior
        every = all_sequences(prior.vocab_size, prior.eos_token_ids, self.base.max_new_tokens)
        batch = self._batch(every.tokens[0], every.lengths[0], p)
        masses = np.exp(batch_log_probs(prior, batch))
        keys, scores, rounding = self._scored(batch.tokens, batch.lengths, p)
        return Cells.of(keys, scores, masses / masses.sum(), 0.0, rounding)

    def _scored(self, tokens: IntArray, lengths: IntArray, p: int) -> tuple[Keys, FloatArray, float]:
        """Return the digests and scores of completions (M, T) of prompt p, and the rounding of their scores."""
        batch = self._batch(tokens, lengths, p)
        scores = self._of(batch)
        few = np.unique(np.linspace(0, len(scores) - 1, _NUM_SCORED_TWICE).astype(np.int64))
        again = np.concatenate([self._of(_part(batch, rows)) for rows in (few[:1], few[1:]) if rows.size])
        return _keys(tokens, lengths), scores, _rounding(scores[few], again)

    def _of(self, batch: Batch) -> FloatArray:
        """Return the scores of the completions of a batch, shape (M,)."""
        (score,) = self.base.likelihood.factors
        return score.values(batch, all_apply=True) if isinstance(score, Reward) else score.values(batch)

    def _batch(self, tokens: IntArray, lengths: IntArray, p: int) -> Batch:
        """Return completions (M, T) of prompt p as a batch."""
        return self.base.batch(tokens, lengths, np.full(len(lengths), p))


@dataclass(frozen=True, eq=False, repr=False)
class RankedFactor(Factor):
    """A factor that depends on a completion through the cell of its score under the prior.

    A subclass declares `fn`, the score, and documents the parameters.
    """

    alpha: float = field(kw_only=True)
    num_reference: int | None = field(default=1024, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    ranks: PriorRanks | None = field(default=None, kw_only=True)
    _known: dict[Any, Any] = field(default_factory=dict, kw_only=True)

    @property
    def label(self) -> str:
        """The given name, or one that names the score."""
        return self.name or f"{type(self).__name__} of {score_of(self.fn).label}"

    @abstractmethod
    def of_cells(self, lower: FloatArray, mass: FloatArray) -> FloatArray:
        """Return the reward of scores from F(s-) and the masses of their cells, all (M,)."""

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`."""
        score_of(self.fn).check_arguments(prior, columns)

    def bind_with(self, setting: Setting, others: tuple[Factor, ...]) -> Self:
        """Return the factor with the prior, whose F is estimated when the first completion is scored."""
        prior = setting.prior
        if self.num_reference is None:
            each = num_sequences(prior.vocab_size, len(prior.eos_token_ids), setting.max_new_tokens)
            if each > _MOST_COMPLETIONS:
                raise BayesKLRLError(
                    f"num_reference = None enumerates all completions of a prompt, here {each:.3g}, more than "
                    f"{_MOST_COMPLETIONS:,}. Give a number of reference draws, such as num_reference=1024."
                )
        base = posterior_of(setting, score_of(self.fn))
        ranks = PriorRanks(base, self.fn, self.num_reference, self.seed, self._known)
        return replace(self, ranks=ranks)

    def tempered(self, gamma: float) -> Self:
        """Return the same reward at alpha / gamma, with the same F."""
        return replace(self, alpha=self.alpha / gamma)

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        if self.ranks is None:
            raise BayesKLRLError(
                f"{self.label!r} depends on the prior and the prompts: put it into a bk.Posterior(prior, likelihood, ...) and "
                "use the posterior's `reward`."
            )
        return self.checked(self.of_cells(*self.ranks(batch)), batch)


def _keys(tokens: IntArray, lengths: IntArray) -> Keys:
    """Return a digest of the ids of each completion (M, T), shape (M,)."""
    rows = np.ascontiguousarray(tokens, dtype=np.int64)
    digests = [blake2b(row[:n].tobytes(), digest_size=16).digest() for row, n in zip(rows, lengths, strict=True)]
    return np.array(digests, dtype="S16")


def _part(batch: Batch, rows: IntArray) -> Batch:
    """Return some of the rows of a batch."""
    return replace(batch, tokens=batch.tokens[rows], lengths=batch.lengths[rows], prompt_index=batch.prompt_index[rows])


def _rounding(scores: FloatArray, again: FloatArray) -> float:
    """Return how far scores of one completion may be apart, relative to 1 + |score|, from some that were computed twice.

    A function that computes each completion by itself gives the same twice, and only its equal scores are ties.
    """
    finite = np.isfinite(scores) & np.isfinite(again)
    differences = np.abs(scores[finite] - again[finite]) / (1 + np.abs(scores[finite]))
    return float(min(_MARGIN * differences.max(initial=0.0), _MOST_ROUNDING))


def _tolerance(scores: FloatArray, rounding: float) -> FloatArray:
    """Return how far each score may be from another one that is the same; 0 for -inf."""
    return np.where(np.isfinite(scores), rounding * (1 + np.abs(np.where(np.isfinite(scores), scores, 0.0))), 0.0)


def _level_starts(values: FloatArray, rounding: float) -> IntArray:
    """Return the index of the lowest score of each level among distinct scores in increasing order.

    A level has the scores within rounding of its lowest one, so that levels of dense scores do not run into each other.
    """
    if rounding == 0:
        return np.arange(len(values))
    ends = np.searchsorted(values, values + _tolerance(values, rounding), side="right")
    starts = [0]
    while ends[starts[-1]] < len(values):
        starts.append(int(ends[starts[-1]]))
    return np.array(starts)


def score_of(fn: Callable[..., Any] | Factor) -> Factor:
    """Return a score as a factor, whose alpha does not matter; a plain function is one of text."""
    return fn if isinstance(fn, Factor) else Reward(fn, alpha=1.0)


def check_reference(factor: RankedFactor) -> None:
    """Refuse a score that is no function of completions, a number of reference draws below 1, and a seed that is none."""
    if isinstance(factor.fn, Likelihood) and not isinstance(factor.fn, Factor):
        raise BayesKLRLError(
            f"fn must be one function, bk.Reward or bk.TokenReward; got the product {factor.fn.label!r}. Write the sum of its "
            "rewards as one function."
        )
    if not isinstance(factor.fn, Factor) and not callable(factor.fn):
        raise BayesKLRLError(
            f"fn must be a function of completions, a bk.Reward or a bk.TokenReward; got {factor.fn!r}."
        )
    if factor.num_reference is not None:
        check_count("num_reference", factor.num_reference)
    check_count("seed", factor.seed, least=0)
