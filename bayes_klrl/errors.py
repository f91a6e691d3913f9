"""Typed errors; each message names the value, the rule and the cure.

ValueError
└── BayesKLRLError            any refusal of ours, plain bad arguments included
    ├── RewardError           a reward raised, or returned something that is not a log-likelihood
    │   └── TextRewardError   a reward on text, and a prior that has no tokenizer
    ├── UnboundedLossError    SVI met a completion of likelihood 0: the ELBO is -inf
    ├── BudgetError           the budget was spent without an answer; carries what was drawn
    ├── ConvergenceError      Markov chains did not converge; carries what was drawn
    ├── SupportError          a distribution has mass where another has none, or no mass at all
    ├── CheckpointError       a folder, file or tokenizer is not what it should be
    ├── DeviceMemoryError     the memory of a card does not hold even the smallest part of the work
    ├── OutputError           a file or folder cannot be written, as on a full disk; nothing half-written is left
    ├── RunnerError           a worker died, cannot be reached, or cannot be sent what it needs
    └── MissingPackageError   an optional package is not installed; also an ImportError
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayes_klrl.draws import Draws
    from bayes_klrl.inference.svi.fit import Fit
    from bayes_klrl.reward_models.posterior import RewardPosterior

__all__ = [
    "BayesKLRLError",
    "BudgetError",
    "CheckpointError",
    "ConvergenceError",
    "DeviceMemoryError",
    "MissingPackageError",
    "OutputError",
    "RewardError",
    "RunnerError",
    "SupportError",
    "TextRewardError",
    "UnboundedLossError",
    "needs",
    "needs_jax",
    "warn_caller",
]


class BayesKLRLError(ValueError):
    """Base of every error that `bayes_klrl` raises on purpose.

    Attributes
    ----------
    fit
        The `Fit` that `SVI` had reached when the error ended its training; None otherwise.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> try:
    ...     bk.ImportanceSampling(num_draws=0)
    ... except bk.BayesKLRLError as error:
    ...     print(error)
    num_draws must be an integer of at least 1; got 0.
    """

    fit: Fit | None = None


class RewardError(BayesKLRLError):
    """A reward function raised an exception, or returned something that cannot be a reward.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> wrong = bk.TokenReward(lambda tokens, lengths: lengths[:1], alpha=1.0, name="wrong")
    >>> try:
    ...     bk.Posterior(coin, wrong, max_new_tokens=3).reward([[1], [0, 1]])
    ... except bk.RewardError as error:
    ...     print(error)
    Reward 'wrong' returned 1 values for 2 completions. It must return one float per completion, in order.
    """


class TextRewardError(RewardError):
    """A reward reads text, but the prior has no tokenizer to decode its tokens with.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> cheerful = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=1.0)
    >>> try:
    ...     bk.Posterior(coin, cheerful, max_new_tokens=3)
    ... except bk.TextRewardError as error:
    ...     print("no tokenizer" in str(error))
    True
    """


class UnboundedLossError(BayesKLRLError):
    """The guide drew a completion of likelihood 0, so its ELBO is -inf and has no gradient.

    The message names the completion and the cure; `fit` is what was learned in the steps before, or None.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> never_one = bk.TokenReward(lambda tokens, lengths: np.where(lengths > 1, 0.0, -np.inf), alpha=1.0)
    >>> try:
    ...     bk.SVI(10).fit(bk.Posterior(coin, never_one, max_new_tokens=3), seed=0)
    ... except bk.UnboundedLossError as error:
    ...     print(str(error).split(",")[0])
    The guide drew the completion with ids [1]
    """


class BudgetError(BayesKLRLError):
    """The budget was spent without an answer.

    Attributes
    ----------
    draws
        The `Draws` that were accepted before the budget ran out, or None.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.2, bounds=(1, 3))
    >>> try:
    ...     bk.RejectionSampling(100, max_proposals=100).run(bk.Posterior(coin, longer, max_new_tokens=3), seed=0)
    ... except bk.BudgetError as error:
    ...     print(error.draws.shape[1] < 100)
    True
    """

    def __init__(self, message: str, draws: Draws | None = None) -> None:
        super().__init__(message)
        self.draws = draws


class ConvergenceError(BayesKLRLError):
    """Markov chains have not converged, so that their draws are not those of the posterior.

    Attributes
    ----------
    result
        The `RewardPosterior` that was drawn, with its diagnostics; None if there is none.

    Examples
    --------
    `RewardModel.fit` raises it; the draws can still be looked at:

    >>> import bayes_klrl as bk
    >>> try:
    ...     raise bk.ConvergenceError("NUTS has not converged: R-hat of theta[0] is 1.300, more than 1.01.", result=None)
    ... except bk.ConvergenceError as error:
    ...     print(error.result)
    None
    """

    def __init__(self, message: str, result: RewardPosterior | None = None) -> None:
        super().__init__(message)
        self.result = result


class SupportError(BayesKLRLError):
    """A distribution has mass where another has none, or no mass at all.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> never = bk.TokenReward(lambda tokens, lengths: np.full(len(lengths), -np.inf), alpha=1.0)
    >>> try:
    ...     bk.Exact().run(bk.Posterior(coin, never, max_new_tokens=3), seed=0)
    ... except bk.SupportError as error:
    ...     print("likelihood" in str(error))
    True
    """


class CheckpointError(BayesKLRLError):
    """A folder, file or tokenizer is not the model that it should be.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> try:
    ...     bk.TorchLM.from_pretrained("no-such-model")
    ... except bk.CheckpointError as error:
    ...     print("no-such-model" in str(error))
    True
    """


class DeviceMemoryError(BayesKLRLError):
    """The memory of a device ran out, and the work cannot be divided any further.

    Completions that are independent are decoded and scored in smaller parts first, with a warning. Particles of one SMC
    population depend on each other and are in memory together.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> try:
    ...     raise bk.DeviceMemoryError("The memory of the device ran out while a single completion was decoded.")
    ... except bk.BayesKLRLError as error:
    ...     print("ran out" in str(error))
    True
    """


class OutputError(BayesKLRLError):
    """A file or folder cannot be written: the disk is full, the place is not there, or one may not write to it.

    A file that was there before is as it was; the error of the system is the cause of this one.

    Attributes
    ----------
    file
        The path that cannot be written.
    written
        Names of the results that were written whole before it, in the same folder.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> draws = bk.Exact().run(bk.Posterior(coin, longer, max_new_tokens=2), seed=0)
    >>> try:
    ...     draws.save("no-such-folder/draws.nc")
    ... except bk.OutputError as error:
    ...     print(str(error).split(". ")[0])
    'no-such-folder/draws.nc' cannot be written: No such file or directory
    """

    def __init__(self, message: str, file: Path | None = None, written: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.file = file
        self.written = tuple(written)


class RunnerError(BayesKLRLError):
    """Work could not be done elsewhere: a worker died, cannot be reached, or cannot be sent what it needs.

    Examples
    --------
    A reward that holds an open file cannot go to another process. This is said before anything is run:

    >>> import tempfile
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> with tempfile.TemporaryFile("w") as log:
    ...     logged = bk.TokenReward(lambda tokens, lengths: lengths + 0 * log.fileno(), alpha=1.0, name="logged")
    ...     posterior = bk.Posterior(coin, logged, max_new_tokens=3)
    ...     try:
    ...         bk.compare(posterior, {"SMC": bk.SMC(64)}, seed=0, runner=bk.ProcessRunner(1))
    ...     except bk.RunnerError as error:
    ...         print(str(error).split(":")[0])
    The reward 'logged' cannot be sent to another process
    """


class MissingPackageError(BayesKLRLError, ImportError):
    """A package is not installed that only a part of `bayes_klrl` needs; the message names the extra that installs it.

    Parameters
    ----------
    what
        The part that needs it.
    package
        The package.
    extra
        The extra of `bayes_klrl`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> try:
    ...     raise bk.MissingPackageError("bk.RayRunner", "ray", "ray")
    ... except ImportError as error:
    ...     print(error)
    bk.RayRunner needs the package ray: pip install 'bayes_klrl[ray]'
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'bayes_klrl[{extra}]'")
        self._arguments = what, package, extra

    def __reduce__(self) -> tuple[type[MissingPackageError], tuple[str, str, str]]:
        """Return how the error is made again in another process."""
        return type(self), self._arguments


@contextmanager
def needs(what: str, extra: str, *packages: str) -> Iterator[None]:
    """Turn a failed import of one of these packages inside the block into a `MissingPackageError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in packages:
            raise
        raise MissingPackageError(what, package, extra) from error


def needs_jax(what: str) -> AbstractContextManager[None]:
    """Turn a failed import of JAX inside the block into an error that names the extra to install."""
    return needs(what, "jax", "jax", "numpyro", "optax")


def warn_caller(message: str) -> None:
    """Warn of the line outside this package from which it was called, however many functions of ours lie between."""
    package = f"{__name__.partition('.')[0]}."
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
