"""How high a score ranks among the prior's completions of the same prompt: the distribution function F of the score.

A score s has the cell [F(s-), F(s)] of the unit interval, whose mass is that of its ties. F is known in one of two ways:

* estimated from M reference draws per prompt: F(s-) = #{s_m < s} / (M + 1), and the cell has mass
  (1 + #{s_m = s}) / (M + 1). The completion counts as one more draw, so that its cell is never empty, and ranks of prior
  draws are uniform for every M;
* exact, by enumeration of all completions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

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

_MOST_COMPLETIONS = 20_000
_STREAM = (70, 1024)  # of the seed: other draws with the same seed have other numbers


@dataclass(frozen=True, eq=False)
class Cells:
    """The distribution function of one prompt's score: its levels, and the prior mass at and below each.

    Parameters
    ----------
    levels, mass, below
        The distinct scores in increasing order, the mass of each and the mass below each, shape (L,).
    own
        The mass that a completion's own draw adds to its cell: 1 / (M + 1), or 0 if F is exact.
    """

    levels: FloatArray
    mass: FloatArray
    below: FloatArray
    own: float

    @classmethod
    def of(cls, scores: FloatArray, masses: FloatArray, own: float) -> Cells:
        """Return the cells of some scores and their masses, both (M,); `own` and all masses sum to 1."""
        levels, level = np.unique(scores, return_inverse=True)
        mass = np.bincount(level, weights=masses).astype(np.float64)
        return cls(levels, mass, np.concatenate([[0.0], mass.cumsum()]), own)

    def __call__(self, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return F(s-) and the mass of the cell of each score, both (M,)."""
        place = np.searchsorted(self.levels, scores)
        inside = np.minimum(place, len(self.levels) - 1)
        return self.below[place], np.where(self.levels[inside] == scores, self.mass[inside], 0.0) + self.own


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
        scores = self._of(batch)
        lower, mass = np.empty(len(batch)), np.empty(len(batch))
        for p in np.unique(batch.prompt_index):
            rows = batch.prompt_index == p
            lower[rows], mass[rows] = self.cells(int(p))(scores[rows])
        return lower, mass

    def cells(self, p: int) -> Cells:
        """Return the distribution function of prompt p, from draws that depend on no other prompt."""
        base = self.base
        values = tuple(column[p] for column in base.columns.values())
        # by identity, because values of columns need not be hashable; the entry keeps them alive
        objects = (base.prior, self.fn, *values)
        options = (self.num_reference, self.seed, base.max_new_tokens, base.prompt_ids[p], repr(base.prompts[p]))
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
        scores = np.concatenate([self._scores(block.tokens, block.lengths, p) for block in blocks])
        return Cells.of(scores, np.full(num_draws, 1 / (num_draws + 1)), 1 / (num_draws + 1))

    def _enumerated(self, p: int) -> Cells:
        """Return F from all completions."""
        prior = self.base.prior
        every = all_sequences(prior.vocab_size, prior.eos_token_ids, self.base.max_new_tokens)
        batch = self._batch(every.tokens[0], every.lengths[0], p)
        masses = np.exp(batch_log_probs(prior, batch))
        return Cells.of(self._scores(batch.tokens, batch.lengths, p), masses / masses.sum(), 0.0)

    def _scores(self, tokens: IntArray, lengths: IntArray, p: int) -> FloatArray:
        """Return the scores of completions (M, T) of prompt p."""
        return self._of(self._batch(tokens, lengths, p))

    def _of(self, batch: Batch) -> FloatArray:
        """Return the scores of the completions of a batch, shape (M,)."""
        (score,) = self.base.likelihood.factors
        return score.values(batch, all_apply=True) if isinstance(score, Reward) else score.values(batch)

    def _batch(self, tokens: IntArray, lengths: IntArray, p: int) -> Batch:
        """Return completions (M, T) of prompt p as a batch."""
        base = self.base
        index = np.full(len(lengths), p)
        return Batch(tokens, lengths, index, base.prompts, base.columns, base.prior, base.prompt_ids)


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
