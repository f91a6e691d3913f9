"""Tasks one after the other, in this process: `SerialRunner`, which is there if no other is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.runners.runner import Outcome, Runner, Task

__all__ = ["SerialRunner", "chosen_runner"]


@dataclass(frozen=True)
class SerialRunner:
    """Runs one task after the other in this process: what `runner=None` stands for.

    Nothing is sent anywhere, so rewards may hold open files, locks and connections.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> comparison = bk.compare(posterior, {"SMC": bk.SMC(64)}, seed=0, runner=bk.SerialRunner())
    >>> bool((comparison["SMC"].tokens == bk.compare(posterior, {"SMC": bk.SMC(64)}, seed=0)["SMC"].tokens).all())
    True
    """

    num_workers: ClassVar[int] = 1

    def map(self, tasks: Sequence[Task], *, progress: bool = False) -> Iterator[Outcome]:
        """See `Runner.map`."""
        for index, task in enumerate(tasks):
            try:
                outcome = Outcome(index, task(progress))
            except Exception as error:  # whoever asked for the task decides what it means
                outcome = Outcome(index, error=error)
            yield outcome


def chosen_runner(runner: Runner | None) -> Runner:
    """Return the runner, by default a `SerialRunner`; refuse what is none."""
    if runner is None:
        return SerialRunner()
    if isinstance(runner, type) or not isinstance(runner, Runner):
        raise BayesKLRLError(
            f"runner must be None, bk.SerialRunner(), bk.ProcessRunner(2) or bk.RayRunner(); got {runner!r}."
        )
    return runner
