"""The rows of a comparison as tasks: what is trained first and shared, what waits for it, and which prompts go together.

A row needs up to three steps: a guide that other rows may share, a twist that is made for all prompts at once, and the draws,
by blocks of prompts. All tasks that are ready go to the runner together; those that had to wait follow in another round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import Advance, track
from bayes_klrl.prompts.part import PosteriorPart
from bayes_klrl.randomness import stream_seed
from bayes_klrl.runners.blocks import answer_of, block_tasks
from bayes_klrl.runners.runner import Outcome, Runner, Task, outcomes_of
from bayes_klrl.typing import Algorithm, GuideRecipe

__all__ = ["Answers", "answers"]


@dataclass(eq=False)
class Answers:
    """What the rows of a comparison came to.

    Parameters
    ----------
    draws
        The answers of each row, one per repeat that succeeded, in their order.
    fits
        The guides that were trained for the first repeat, by the first row that used them.
    failures
        The last error of each row that had one.
    """

    draws: dict[str, list[Draws]] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    failures: dict[str, BayesKLRLError] = field(default_factory=dict)


@dataclass(eq=False)
class _Training:
    """A guide that rows of one repeat share: its recipe, and what became of it."""

    recipe: GuideRecipe
    seed: int
    repeat: int
    first: str  # the row that asked for it first
    outcome: Fit | BayesKLRLError | None = None


@dataclass(eq=False)
class _Row:
    """One row in one repeat, and how far it is."""

    name: str
    repeat: int
    algorithm: Any
    seed: int
    training: _Training | None
    is_prepared: bool = False  # whether proposal and twist were made for all prompts
    training_cost: Cost = field(default_factory=Cost)  # of what was made for it: its guide, its twist
    draws: Draws | None = None
    error: BayesKLRLError | None = None
    tasks: list[Task] = field(default_factory=list)
    shared: tuple[Any, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether its guide is still to be trained."""
        return self.training is not None and self.training.outcome is None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.draws is not None or self.error is not None

    def begin(self, posterior: Posterior) -> None:
        """Make the tasks of the next step: those of a block each, or the one that comes before."""
        if self.training is not None and isinstance(self.training.outcome, BayesKLRLError):
            self.error = self.training.outcome  # a training that failed is not tried again
            return
        if self.training is not None and isinstance(self.training.outcome, Fit):
            fit = self.training.outcome
            self.algorithm, self.shared, self.training = _with_guide(self.algorithm, fit), (fit.guide,), None
            self.training_cost = replace(fit.training, seconds=0.0, model_tokens=0)
        self.tasks = block_tasks(self.name, self.algorithm, posterior, self.seed, self.shared)
        if len(self.tasks) > 1 and not (self.is_prepared or getattr(self.algorithm, "is_prepared", True)):
            known = (posterior, posterior.prior, *self.shared)
            self.tasks = [Task(self.name, _prepare, (self.algorithm, posterior, self.seed), known)]

    def take(self, outcomes: Sequence[Outcome], posterior: Posterior) -> None:
        """Take the outcomes of its tasks."""
        if self.tasks[0].function is _prepare:
            (outcome,) = outcomes
            if outcome.error is None:
                (self.algorithm, cost), self.is_prepared = outcome.value, True
                self.training_cost += cost
            else:
                assert isinstance(outcome.error, BayesKLRLError)
                self.error = outcome.error
            return
        self.draws, self.error = answer_of(posterior, self.tasks, outcomes)
        if self.draws is not None:
            self.draws = replace(self.draws, cost=self.draws.cost + self.training_cost)
            if isinstance(self.error, BudgetError):
                self.error.draws = self.draws


def answers(
    posterior: Posterior,
    algorithms: Mapping[str, Algorithm],
    *,
    seed: int,
    repeats: int,
    runner: Runner,
    progress: bool,
) -> Answers:
    """Return the answers of all rows; a row that fails has its error there, and the others keep their answers."""
    found = Answers()
    with track("all methods", len(algorithms) * repeats, progress) as advance:
        for some in _repeats_at_once(repeats, runner.num_workers):
            rows, trainings = _rows(algorithms, seed, some)
            _run(posterior, rows, trainings, runner, progress, advance)
            for training in trainings:
                if training.repeat == 0 and isinstance(training.outcome, Fit):
                    found.fits[training.first] = training.outcome
            for row in rows:
                if row.error is not None:
                    found.failures[row.name] = row.error
                if row.draws is not None:
                    found.draws.setdefault(row.name, []).append(row.draws)
    return found


def _repeats_at_once(repeats: int, num_workers: int) -> Iterator[range]:
    """Yield the repeats that are run together: guides of as many repeats as there are workers are in memory."""
    for first in range(0, repeats, num_workers):
        yield range(first, min(first + num_workers, repeats))


def _rows(algorithms: Mapping[str, Algorithm], seed: int, repeats: range) -> tuple[list[_Row], list[_Training]]:
    """Return the rows of some repeats, and the trainings that they need, each once per repeat."""
    rows, trainings = [], []
    for repeat in repeats:
        own: list[_Training] = []
        for name, algorithm in algorithms.items():
            recipe = algorithm if isinstance(algorithm, GuideRecipe) else getattr(algorithm, "proposal", None)
            training = None
            if isinstance(recipe, GuideRecipe):
                training = next((each for each in own if recipe.trains_like(each.recipe)), None)
                if training is None:
                    training = _Training(recipe, stream_seed(seed, repeat, "SVI"), repeat, name)
                    own.append(training)
            rows.append(_Row(name, repeat, algorithm, stream_seed(seed, repeat, name), training))
        trainings += own
    return rows, trainings


def _run(
    posterior: Posterior,
    rows: list[_Row],
    trainings: list[_Training],
    runner: Runner,
    progress: bool,
    advance: Advance,
) -> None:
    """Run everything, in as many rounds as rows have to wait for something."""
    new = trainings
    while open_rows := [row for row in rows if not row.is_done]:
        ready = [row for row in open_rows if not row.waits]
        for row in ready:
            row.begin(posterior)
            if row.is_done:
                advance(status=row.name)
        ready = [row for row in ready if not row.is_done]
        known = (posterior, posterior.prior)
        fits = [Task(f"the training of {each.first}", _fit, (each.recipe, posterior, each.seed), known) for each in new]
        tasks = fits + [task for row in ready for task in row.tasks]
        shares = [0.0] * len(fits) + [
            (0.0 if row.tasks[0].function is _prepare else 1 / len(row.tasks)) for row in ready for _ in row.tasks
        ]
        outcomes = outcomes_of(runner, tasks, progress=progress, advance=_advancing(advance, tasks, shares))
        for training, outcome in zip(new, outcomes, strict=False):
            training.outcome = outcome.value if outcome.error is None else outcome.error  # type: ignore[assignment]
        place, new = len(fits), []
        for row in ready:
            row.take(outcomes[place : place + len(row.tasks)], posterior)
            place += len(row.tasks)


def _advancing(advance: Advance, tasks: Sequence[Task], shares: Sequence[float]) -> Advance:
    """Return a function that is called after each task, and moves the line by the task's share of its row."""
    left: dict[str, list[float]] = {}
    for task, share in zip(tasks, shares, strict=True):
        left.setdefault(task.name, []).append(share)

    def advancing(status: str = "") -> None:
        advance(left[status].pop(), status=status)

    return advancing


def _fit(recipe: GuideRecipe, posterior: Posterior, seed: int, *, progress: bool) -> Fit:
    """Return a trained guide."""
    return recipe.fit(posterior, seed=seed, progress=progress)


def _prepare(algorithm: Any, posterior: Posterior, seed: int, *, progress: bool) -> tuple[Algorithm, Cost]:
    """Return an algorithm with its proposal and twist made for all prompts, and what that cost."""
    prepared: tuple[Algorithm, Cost] = algorithm.prepared(posterior, seed, progress)
    return prepared


@dataclass(frozen=True)
class _Fitted:
    """An algorithm that draws from a guide which is already trained; the training is not in its cost."""

    fit: Fit
    num_draws: int

    @property
    def rows_per_prompt(self) -> int | None:
        """Completions per prompt; None for a fit of another kind, whose draws may depend on all prompts."""
        return self.num_draws if type(self.fit).run is Fit.run else None

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`."""
        fit = replace(self.fit, posterior=posterior) if isinstance(posterior, PosteriorPart) else self.fit
        draws = fit.run(self.num_draws, seed, progress=progress)
        return replace(draws, cost=replace(draws.cost, training_tokens=0, training_seconds=0.0))


def _with_guide(algorithm: Any, fit: Fit) -> Algorithm:
    """Return the algorithm with the trained guide in the place of its recipe."""
    if isinstance(algorithm, GuideRecipe):
        return _Fitted(fit, algorithm.num_draws)
    amortised: Algorithm = replace(algorithm, proposal=fit.guide)
    return amortised
