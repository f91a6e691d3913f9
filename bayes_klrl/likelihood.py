"""Rewards as likelihoods: log p(goal | x) = r(x) / alpha, products and powers of them.

A `Likelihood` is a product of factors, and a factor is a function of completions: `Reward` reads text (with the
signature that TRL gives reward functions), `TokenReward` reads token arrays, `Constraint` says yes or no. The functions read
a `Batch`, and `bayes_klrl.reward_functions` calls them. Their values are checked once, so that only log-likelihoods reach the
algorithms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.reward_functions.calls import called_on_text, called_on_tokens
from bayes_klrl.reward_functions.limits import MAX_NATS, check_alpha_and_bounds, check_nats, positive
from bayes_klrl.reward_functions.returned import check_bounds, check_numbers, to_floats
from bayes_klrl.reward_functions.signatures import accepts, function_name, parameters
from bayes_klrl.reward_functions.sums import check_text_functions, checked_functions, checked_weights, weighted_sum
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = [
    "MAX_NATS",
    "Constraint",
    "Factor",
    "Likelihood",
    "Reward",
    "TokenReward",
    "check_alpha_and_bounds",
    "check_nats",
    "product",
]


class Likelihood(ABC):
    """A product of factors; `a * b` multiplies, `a ** gamma` tempers.

    If all rewards have the same alpha, they add: r = r_a + r_b at that alpha. If their alphas differ, the product has
    alpha = 1 and its reward is the log-likelihood. A `Constraint` has no alpha: it contributes 0 or -inf to the reward
    and tempering does not change it. Always log-likelihood = reward / alpha (alpha = 1 for constraints alone).

    Attributes
    ----------
    alpha
        Units of reward per nat; None if there are constraints only.
    bounds
        The declared range (low, high) of the reward, or None if a factor declares none.
    name
        The name in tables and plots; None: the function's own name.

    Examples
    --------
    >>> short = Reward(lambda completions: [-len(c) for c in completions], alpha=2.0, name="short")
    >>> (short ** 0.5).alpha, (short * short).alpha
    (4.0, 2.0)
    """

    alpha: float | None
    bounds: tuple[float, float] | None
    name: str | None

    @property
    @abstractmethod
    def factors(self) -> tuple[Factor, ...]:
        """The functions that are multiplied."""

    @property
    def label(self) -> str:
        """The name in error messages: the given one, or those of the functions."""
        return self.name or " * ".join(factor.label for factor in self.factors)

    def __mul__(self, other: object) -> Likelihood:
        if not isinstance(other, Likelihood):
            return NotImplemented
        return product((*self.factors, *other.factors))

    def __pow__(self, gamma: float) -> Likelihood:
        power = positive("The exponent gamma of likelihood ** gamma", gamma)
        return product(tuple(factor.tempered(power) for factor in self.factors))

    def reward(self, batch: Batch) -> FloatArray:
        """Return r(x) of every completion, shape (M,), float64; -inf outside a constraint."""
        total = np.zeros(len(batch))
        for factor in self.factors:
            total += factor.checked_values(batch) * factor.scale_in(self.alpha)
        check_nats(total, self.alpha, self.label, batch)
        return total

    def log_likelihood(self, reward: FloatArray) -> FloatArray:
        """Return reward / alpha in nats, same shape.

        Raises
        ------
        RewardError
            If a finite reward is more than `MAX_NATS`.
        """
        check_nats(reward, self.alpha, self.label)
        return reward / (self.alpha or 1.0)

    @property
    def depends_on_alpha(self) -> bool:
        """Whether the reward itself, not only its weight, changes with alpha: then a path over alpha has no single reward."""
        return any(factor.depends_on_alpha for factor in self.factors)

    @property
    def prior_power(self) -> float:
        """A number k such that the likelihood is p0(x)^k times its declared bound at most; 0 where none is known."""
        return sum(factor.prior_power for factor in self.factors)

    def bind(self, setting: Setting) -> Likelihood:
        """Return the likelihood for a prior and its prompts: itself, unless a factor depends on them.

        `Posterior` calls it once, while it is being made, with all its parts except the likelihood.
        """
        factors = self.factors
        ready = tuple(factor.bind_with(setting, factors[:i] + factors[i + 1 :]) for i, factor in enumerate(factors))
        return self if all(a is b for a, b in zip(factors, ready, strict=True)) else product(ready)

    def check(self, prior: LanguageModel, columns: Iterable[str]) -> None:
        """Refuse, before any work, a function that asks for an argument that this posterior cannot give it."""
        for factor in self.factors:
            factor.check_arguments(prior, frozenset(columns))


@dataclass(frozen=True, eq=False)
class _Product(Likelihood):
    """Several factors, multiplied; made by `product`."""

    parts: tuple[Factor, ...]
    alpha: float | None
    bounds: tuple[float, float] | None
    name: str | None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """See `Likelihood.factors`."""
        return self.parts


def product(factors: tuple[Factor, ...]) -> Likelihood:
    """Return the product of factors: their common alpha if they have one, else alpha = 1."""
    if len(factors) == 1:
        return factors[0]
    alphas = {factor.alpha for factor in factors if factor.alpha is not None}
    alpha = None if not alphas else alphas.pop() if len(alphas) == 1 else 1.0
    lows, highs = [], []
    for factor in factors:
        if factor.bounds is not None:
            lows.append(factor.bounds[0] * factor.scale_in(alpha))
            highs.append(factor.bounds[1] * factor.scale_in(alpha))
    bounds = (sum(lows), sum(highs)) if len(lows) == len(factors) else None
    return _Product(factors, alpha, bounds, " * ".join(factor.label for factor in factors))


class Factor(Likelihood):
    """One function of completions as a factor of a likelihood."""

    fn: Any

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Itself."""
        return (self,)

    @property
    def label(self) -> str:
        """The given name, or the function's own."""
        return self.name or function_name(self.fn)

    @property
    def depends_on_alpha(self) -> bool:
        """See `Likelihood.depends_on_alpha`."""
        return False

    @property
    def prior_power(self) -> float:
        """See `Likelihood.prior_power`."""
        return 0.0

    def bind_with(self, setting: Setting, others: tuple[Factor, ...]) -> Factor:
        """Return the factor for a prior and its prompts, given the likelihood's `others` factors; see `Likelihood.bind`."""
        return self

    def scale_in(self, alpha: float | None) -> float:
        """Return the number that multiplies the factor's reward in a product at `alpha`."""
        return 1.0 if self.alpha is None or self.alpha == alpha else (alpha or 1.0) / self.alpha

    @abstractmethod
    def tempered(self, gamma: float) -> Factor:
        """Return the factor to the power gamma."""

    @abstractmethod
    def values(self, batch: Batch) -> FloatArray:
        """Return the factor's checked reward, shape (M,)."""

    def checked_values(self, batch: Batch) -> FloatArray:
        """Return `values`, refusing rewards of more nats than float64 resolves, see `check_nats`."""
        values = self.values(batch)
        check_nats(values, self.alpha, self.label, batch)
        return values

    @abstractmethod
    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`."""

    def checked(self, outcome: Any, batch: Batch) -> FloatArray:
        """Return the function's values as float64 (M,); an error says which value is wrong, and for which completion."""
        values = to_floats(outcome, self.label, batch)
        check_numbers(values, self.label, batch)
        check_bounds(values, self.bounds, self.label, batch)
        return values


class _TextFactor(Factor):
    """A factor whose functions have the signature of TRL's reward functions."""

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions, one or several."""
        return self.fn if isinstance(self.fn, tuple) else (self.fn,)

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`; also refuses a function of text if the prior cannot decode its tokens."""
        check_text_functions(self.functions, self.label, prior, columns)


@dataclass(frozen=True, eq=False)
class Reward(_TextFactor):
    """The factor exp(r(x) / alpha) for a function r of text, or for a weighted sum r = sum_k w_k r_k of several.

    TRL's reward functions work unchanged: async ones run concurrently, and an `nn.Module` gets what its `forward` asks for,
    without gradient and dropout. A reward model is a `ClassifierReward`.

    Parameters
    ----------
    fn
        Function that takes a list of completions and returns one float per completion. A sole required parameter receives
        the completions, unless TRL or this package uses its name for something else; by name it may also ask for `prompts`,
        `completions`, `completion_ids`, `finished` and any column given to the posterior; `**kwargs` receives all of them.
        None instead of a float says that the reward does not apply: its factor is then 1, and a warning says so once. TRL's
        `log_extra` and `log_metric` are given by name and do nothing. A list of functions is their weighted sum.
    alpha
        Units of reward per nat ("beta" in TRL and DPO); positive and finite.
    weights
        w_k, one finite number per function ("reward_weights" in TRL); None: all are 1.
    bounds
        The declared range (low, high) of the reward; values outside it are an error. None: no range is declared.
    name
        Name in tables and error messages; None: the functions' own names.

    Raises
    ------
    BayesKLRLError
        If alpha is not positive and finite, the bounds are not a pair low <= high, or `fn` is no function of text.

    Examples
    --------
    >>> cheerful = Reward(lambda completions: [c.count("!") for c in completions], alpha=0.5, name="cheerful")
    >>> cheerful.alpha
    0.5
    >>> import bayes_klrl as bk
    >>> prior = bk.NgramLM.fit(["ha!", "hm."], order=2)
    >>> bk.Posterior(prior, cheerful, max_new_tokens=4).reward([prior.encode(["ha!!"])[0]])
    array([[2.]])

    >>> both = Reward([cheerful.fn, lambda texts: [len(text) for text in texts]], alpha=0.5, weights=[1.0, -0.5])
    >>> bk.Posterior(prior, both, max_new_tokens=4).reward([prior.encode(["ha!!"])[0]])
    array([[0.]])
    """

    fn: Callable[..., Any] | Sequence[Callable[..., Any]]
    alpha: float = field(kw_only=True)
    weights: Sequence[float] | None = field(default=None, kw_only=True)
    bounds: tuple[float, float] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    _said: set[str] = field(default_factory=set, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fn", checked_functions(self.fn))
        object.__setattr__(self, "weights", checked_weights(self.weights, len(self.functions)))
        check_alpha_and_bounds(self)

    @property
    def label(self) -> str:
        """The given name, or those of the functions."""
        return self.name or " + ".join(map(function_name, self.functions))

    def tempered(self, gamma: float) -> Reward:
        """Return the same reward at alpha / gamma."""
        return replace(self, alpha=self.alpha / gamma)

    def values(self, batch: Batch, *, all_apply: bool = False) -> FloatArray:
        """See `Factor.values`; 0 where the reward does not apply, which is an error if `all_apply`."""
        said = None if all_apply else self._said
        return self.checked(weighted_sum(self.functions, self.weights or (), self.name, batch, said=said), batch)


@dataclass(frozen=True, eq=False)
class TokenReward(Factor):
    """The factor exp(r(x) / alpha) for a function r of token arrays.

    Parameters
    ----------
    fn
        `fn(tokens (N, T) int, lengths (N,) int) -> (N,)` on NumPy arrays, T = max_new_tokens. Positions past the length
        hold the EOS id (0 if there is none), never -1. It may ask by name for `prompt_index` (N,). Inside a NumPyro program
        (`Posterior.numpyro_model`, `SVI` on a `JaxLM`) it gets traced JAX arrays, int32. A function written in jax.numpy, or
        with methods and operators that NumPy and JAX share, works everywhere.
    alpha, bounds, name
        The same as for `Reward`.
    callback
        Whether JAX calls the function on the host instead of tracing it.

    Examples
    --------
    >>> longer = TokenReward(lambda tokens, lengths: lengths, alpha=2.0, bounds=(1, 3), name="longer")
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> bk.Posterior(coin, longer, max_new_tokens=3).log_likelihood([[1], [0, 1]])
    array([[0.5, 1. ]])
    """

    fn: Callable[..., Any]
    alpha: float = field(kw_only=True)
    bounds: tuple[float, float] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    callback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise BayesKLRLError(f"A reward is a function of completions; got {self.fn!r}.")
        check_alpha_and_bounds(self)

    def tempered(self, gamma: float) -> TokenReward:
        """Return the same reward at alpha / gamma."""
        return replace(self, alpha=self.alpha / gamma)

    @property
    def asked_for(self) -> tuple[str, ...]:
        """The arguments that the function asks for by name."""
        required, optional, _ = parameters(self.fn)
        return ("prompt_index",) if "prompt_index" in (*required, *optional) else ()

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`."""
        if not accepts(self.fn, None, None, **dict.fromkeys(self.asked_for)):
            raise RewardError(
                f"TokenReward {self.label!r} must take (tokens, lengths) and may ask for prompt_index; its required "
                f"parameters are {parameters(self.fn)[0]}."
            )

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        return self.checked(called_on_tokens(self.fn, self.label, batch), batch)


@dataclass(frozen=True, eq=False)
class Constraint(_TextFactor):
    """The factor 1[x in A], the hard limit of a reward; it has no alpha.

    Parameters
    ----------
    fn
        Function with the signature of a `Reward`'s that returns one bool per completion: whether it is in A. None is an error:
        a search that finds nothing returns it, too.
    name
        Name in tables and error messages; None: the function's own name.

    Examples
    --------
    >>> no_z = Constraint(lambda completions: ["z" not in c for c in completions])
    >>> no_z.alpha is None, (no_z ** 3.0).alpha is None
    (True, True)
    """

    fn: Callable[..., Any]
    name: str | None = field(default=None, kw_only=True)
    alpha: None = field(default=None, init=False)
    bounds: tuple[float, float] = field(default=(-np.inf, 0.0), init=False)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise BayesKLRLError(f"A constraint is a function of completions; got {self.fn!r}.")

    def tempered(self, gamma: float) -> Constraint:
        """Return the constraint itself: 0 and 1 to any positive power are 0 and 1."""
        return self

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        return self.checked(called_on_text(self.fn, self.label, batch), batch)

    def checked(self, outcome: Any, batch: Batch) -> FloatArray:
        """Return 0 where the constraint holds, -inf where not, shape (M,)."""
        holds = to_floats(outcome, self.label, batch)
        strange = ~np.isin(holds, (0.0, 1.0))
        if strange.any():
            row = int(strange.argmax())
            raise RewardError(
                f"Constraint {self.label!r} returned {holds[row]} for {batch.describe(row)}. A constraint returns True "
                "or False; for degrees use bk.Reward."
            )
        return np.where(holds == 1.0, 0.0, -np.inf)
